"""Splits text into the text tower's segments, by past tokens only.

The text tower sees one segment at once: SOT and at most `limit` tokens. A segment ends after a sentence, once it holds
`min_tokens` new tokens, or when it is full. The next segment starts with its last `overlap` tokens, so that every token
has some context. SOT and EOT in the text begin and end documents, and no context crosses documents.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

SENTENCE_END = re.compile(r"""[.!?]+["')\]]*</w>""")


@dataclass(frozen=True)
class SegmentRule:
    """The limits and ids that determine segments.

    Attributes:
        limit: the most tokens of a segment, without SOT.
        overlap: tokens carried over into the next segment (a shorter segment is carried over whole).
        min_tokens: number of new tokens from which on the end of a sentence ends a segment.
        eot_in_segment: whether the text tower reads EOT as the last token of its segment.
    """

    sot: int
    eot: int
    sentence_ends: frozenset[int]
    limit: int
    overlap: int
    min_tokens: int
    eot_in_segment: bool


@dataclass
class Run:
    """Tokens of one segment of one row that will be encoded in one call.

    Attributes:
        ids: the tokens.
        start: the number of tokens of the segment (with SOT) encoded before, 0 for a new segment.
        wanted: (position in the row's input, position in `ids`) of the tokens whose query is needed. A position of -1
            in `ids` is the last token cached by an earlier call.
        kept: the number of `ids` that are cached for later calls.
        branches: runs that continue from a token of this run; their `start` names the token.
    """

    row: int
    ids: list[int]
    start: int
    wanted: list[tuple[int, int]] = field(default_factory=list)
    kept: int = 0
    branches: list[Run] = field(default_factory=list)

    def key(self) -> bytes:
        """A key that is equal for two runs if and only if they need the same queries of the same tokens."""
        return array("q", self._numbers()).tobytes()

    @property
    def whole(self) -> bool:
        """Whether the run neither continues an earlier call nor is continued, so that its queries depend on `key`."""
        return self.start == 0 and self.kept == 0

    def positions(self) -> list[int]:
        """Positions of the wanted queries in the row's input, in the same order for all runs of one key."""
        return [position for run in (self, *self.branches) for position, _ in run.wanted]

    def _numbers(self) -> list[int]:
        wanted = [at for _, at in self.wanted]
        branches = [number for branch in self.branches for number in branch._numbers()]
        return [self.start, len(self.ids), *self.ids, len(wanted), *wanted, len(self.branches), *branches]


@dataclass
class SegmentState:
    """State of reading one row of text."""

    open: bool = False  # the next token belongs to the current document
    ended: bool = False  # the next token starts a new segment
    text: list[int] = field(default_factory=list)  # the segment's tokens after SOT
    own: int = 0  # the number of these tokens that were not carried over

    def copy(self) -> SegmentState:
        return SegmentState(self.open, self.ended, list(self.text), self.own)


class Reading:
    """Splits further tokens of one row into runs, continuing from `state`.

    `add` reads a token. Then `want` requests the query of the text so far, `fork` the query of the text so far followed
    by other tokens, and `keep` makes later calls continue from here: `kept` is their state.
    """

    def __init__(self, row: int, state: SegmentState, rule: SegmentRule):
        self.row = row
        self.rule = rule
        self.state = state.copy()
        self.kept = state
        self.runs: list[Run] = []
        self.forks: list[Run] = []  # forks that begin a new segment
        if state.open and not state.ended:
            self._go_on()

    def add(self, id: int) -> None:
        state, rule = self.state, self.rule
        if id == rule.sot:
            self._begin([])
        elif id == rule.eot:
            if not state.open:
                self._begin([])
            elif not self.runs:
                self._go_on()
            if rule.eot_in_segment:
                self.runs[-1].ids.append(id)
            state.open = False
        else:
            if not state.open:
                self._begin([])
            elif state.ended:
                self._begin(state.text[max(0, len(state.text) - rule.overlap) :])
            self.runs[-1].ids.append(id)
            state.text.append(id)
            state.own += 1
            sentence_over = id in rule.sentence_ends and state.own >= rule.min_tokens
            state.ended = sentence_over or len(state.text) == rule.limit

    def want(self, position: int) -> None:
        if not self.runs:
            self._go_on()
        self.runs[-1].wanted.append((position, len(self.runs[-1].ids) - 1))

    def fork(self, ids: list[int], positions: list[int]) -> None:
        branch = Reading(self.row, self.state, self.rule)
        for id in ids:
            branch.add(id)
        run = branch.runs[-1]  # segments before it need no queries
        run.wanted = [(position, len(run.ids) - 1) for position in positions]
        if run.start:
            self.runs[-1].branches.append(run)
        else:
            self.forks.append(run)

    def keep(self) -> None:
        self.kept = self.state.copy()
        if self.state.open and self.runs:
            self.runs[-1].kept = len(self.runs[-1].ids)

    def _begin(self, carried: list[int]) -> None:
        state = self.state
        state.open, state.ended, state.text, state.own = True, False, list(carried), 0
        self.runs.append(Run(self.row, [self.rule.sot, *carried], start=0))

    def _go_on(self) -> None:
        self.runs.append(Run(self.row, [], start=1 + len(self.state.text)))


def sentence_end_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the tokens that end a sentence: one or several of `.`, `!`, `?`, then closing quotes and brackets."""
    return frozenset(id for token, id in tokenizer.get_vocab().items() if SENTENCE_END.fullmatch(token))
