"""Where the text tower's segments begin and end: decided by past tokens alone.

A segment is what the text tower sees at once: SOT and at most `limit` tokens. It ends after a sentence once it
has `min_tokens` of its own, or when it is full. The next one starts with its last `overlap` tokens, so that no
token is read without the ones before it. SOT and EOT in the text begin and end documents, and nothing is carried
from one document into another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

SENTENCE_END = re.compile(r"""[.!?]+["')\]]*</w>""")


@dataclass(frozen=True)
class SegmentRule:
    """The numbers that decide, and the ids that matter.

    limit: most tokens of a segment, beside SOT. overlap: tokens carried into the next segment.
    min_tokens: tokens of its own after which a sentence end ends a segment.
    eot_in_segment: whether EOT is read by the text tower as the last token of its segment.
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
    """Tokens of one segment of one row that are to be encoded now.

    ids: the tokens; start: how many tokens of the segment (with SOT) were encoded before, 0 for a new segment.
    wanted: (position in the row's input, position in `ids`) of the tokens whose query is asked for. A position of
        -1 in `ids` is the last token of an earlier call.
    goes_on: whether later tokens may still look at these.
    """

    row: int
    ids: list[int]
    start: int
    wanted: list[tuple[int, int]] = field(default_factory=list)
    goes_on: bool = False


@dataclass
class SegmentState:
    """How far one row of text has been read."""

    open: bool = False  # a document is open: the next token belongs to it
    ended: bool = False  # its segment has ended: the next token starts another
    text: list[int] = field(default_factory=list)  # the segment's tokens after SOT
    own: int = 0  # how many of them were not carried over

    def copy(self) -> SegmentState:
        return SegmentState(self.open, self.ended, list(self.text), self.own)

    def read(self, row: int, tokens: list[tuple[int, int]], rule: SegmentRule) -> list[Run]:
        """Cuts further tokens, as (position in the input, id), into runs."""
        runs: list[Run] = []
        if self.open and not self.ended:
            runs.append(Run(row, [], start=1 + len(self.text)))

        def begin(carried: list[int]) -> None:
            self.open, self.ended, self.text, self.own = True, False, list(carried), 0
            runs.append(Run(row, [rule.sot, *carried], start=0))

        for position, id in tokens:
            if id == rule.sot:
                begin([])
            elif id == rule.eot:
                if not self.open:
                    begin([])
                elif self.ended and not runs:
                    runs.append(Run(row, [], start=1 + len(self.text)))
                if rule.eot_in_segment:
                    runs[-1].ids.append(id)
                self.open = False
            else:
                if not self.open:
                    begin([])
                elif self.ended:
                    begin(self.text[len(self.text) - rule.overlap :])
                runs[-1].ids.append(id)
                self.text.append(id)
                self.own += 1
                sentence_over = id in rule.sentence_ends and self.own >= rule.min_tokens
                self.ended = sentence_over or len(self.text) == rule.limit
            runs[-1].wanted.append((position, len(runs[-1].ids) - 1))
        if runs:
            runs[-1].goes_on = self.open
        return [run for run in runs if run.wanted]


def sentence_end_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the pieces that end a sentence: `.`, `!` or `?`, several of them, closing quotes and brackets after."""
    return frozenset(id for piece, id in tokenizer.get_vocab().items() if SENTENCE_END.fullmatch(piece))
