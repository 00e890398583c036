"""One query per token from CLIP's text tower, without looking ahead."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip, in_own_precision
from valm.clip.text_tower import TextTower
from valm.retrieval.alignment import Alignment, TextState
from valm.retrieval.segments import Reading, Run, SegmentRule, SegmentState, sentence_end_ids

QUERIES = ("eot", "state")
# The settings of queries besides CLIP and tokenizer, in a corpus' plan and a model's config.
QUERY_SETTINGS = ("query", "overlap", "min_tokens", "precision")

# Tokens repeated at the start of the next segment. On running prose (LAMBADA) with a context of 77 tokens, the text
# tower reads 1.27 tokens for each token of the text; with an overlap of 16 it would be 1.35.
OVERLAP = 12

# Tokens of one call of the text tower, which bounds memory for any batch. On a CPU the allocator returns larger blocks
# to the system, which causes page faults in the next layer. A GPU needs larger calls.
CALL_TOKENS = 8192
CPU_CALL_TOKENS = 2048


class ContextCache:
    """State of incremental encoding: for each row its segment, with the segment's keys and values.

    `ContextEncoder.new_cache` makes a cache, `ContextEncoder.step` changes it in place.
    """

    def __init__(self, batch: int, tower: TextTower, embed_dim: int):
        self.states = [SegmentState() for _ in range(batch)]
        self.texts = [TextState() for _ in range(batch)]  # used if the ids are not CLIP's
        like = tower.positions
        # Holds SOT and the tokens of a segment, but no EOT, which no other token sees. Token p of a segment is at index
        # capacity-1-p, so the last P entries are always the P tokens before the next token.
        self.capacity = len(like) - 1
        self.past = like.new_zeros(len(tower.blocks), 2, batch, tower.heads, self.capacity, tower.head_dim)
        self.last_query = torch.zeros(batch, embed_dim, device=like.device)  # float32, for the last cached token

    def reorder(self, beam_idx: Tensor) -> None:
        """Makes row i a copy of row beam_idx[i], (new batch,) int64, for beam search."""
        self.states = [self.states[row].copy() for row in beam_idx.tolist()]
        self.texts = [self.texts[row].copy() for row in beam_idx.tolist()]
        index = beam_idx.to(self.last_query.device)
        self.past = self.past[:, :, index]
        self.last_query = self.last_query[index]

    def join(self, other: ContextCache) -> None:
        """Appends the rows of another cache of the same encoder."""
        self.states += other.states
        self.texts += other.texts
        self.past = torch.cat([self.past, other.past], 2)
        self.last_query = torch.cat([self.last_query, other.last_query])


class ContextEncoder:
    """Retrieval queries: CLIP's encoding of the text up to each token. `encoder(input_ids)` returns (B, T, E) float32.

    A token's query depends only on the token and the tokens before it. It is the same, up to rounding, in any batch,
    with any padding, and token by token. bos begins a document and eos ends it; text without bos is read as if it had
    one. The query at eos encodes the whole text. If the language model's tokenizer has a chat template, bos and eos may
    separate turns, so a row is one document. The first token of a document gets no query and so no images: other tokens
    attend to it as a sink, and an image there took 99 % of its attention (SmolLM2-135M).

    Threads may share an encoder and call any of its methods at once. A cache belongs to one thread at a time.

    Args:
        clip: the CLIP; its text tower must be causal (see `TextTower`).
        tokenizer: the tokenizer of the ids, by default CLIP's. For another tokenizer, CLIP tokenizes the text up to
            each token's last character (`Alignment`).
        query: "eot" is CLIP's text feature of each prefix, as if EOT followed: the state that CLIP was trained for.
            "state" is the tower's state at the token itself, as published (Wang et al. 2022, section 2.2).
        overlap, min_tokens: see `SegmentRule`. By default the overlap is OVERLAP or, if less, a quarter of a segment,
            and min_tokens is half a segment.
        dtype: precision of the text tower: float32, bfloat16, float64 or int8. Queries are always float32.

    Raises:
        ValueError: query, overlap or min_tokens has a wrong value.
        ValmError: the text tower or the tokenizer cannot be used; see `TextTower` and `Alignment`.

    Example:
        >>> encoder = valm.ContextEncoder(valm.Clip.load("clip"))
        >>> input_ids = encoder.tokenizer(["a red apple"], return_tensors="pt").input_ids
        >>> queries = encoder(input_ids)
        >>> queries.shape == (1, input_ids.shape[1], encoder.clip.embed_dim)
        True
    """

    def __init__(
        self,
        clip: Clip,
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        query: str = "eot",
        overlap: int | None = None,
        min_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if query not in QUERIES:
            raise ValueError(f"query must be one of {', '.join(map(repr, QUERIES))}, got {query!r}")
        limit = clip.context_length - 2
        overlap = min(OVERLAP, limit // 4) if overlap is None else overlap
        min_tokens = limit // 2 if min_tokens is None else min_tokens
        if not 0 <= overlap < limit:
            raise ValueError(f"overlap must be from 0 to {limit - 1} for this CLIP, got {overlap}")
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
        self.clip = clip
        self.tower = TextTower(clip, dtype)
        self.own_tokenizer = tokenizer is None  # the caller named no tokenizer, so the ids are CLIP's
        self.tokenizer = clip.tokenizer if tokenizer is None else tokenizer
        self.query = query
        self.num_ids, self._whose_ids = self.tower.embedding.num_embeddings, f"the CLIP {clip.name}"
        self.alignment: Alignment | None = None
        if self.tokenizer.get_vocab() != clip.tokenizer.get_vocab():
            self.alignment = Alignment(self.tokenizer, clip.tokenizer)
            self.num_ids, self._whose_ids = len(self.alignment.bytes_of), "the tokenizer"
        self.rule = SegmentRule(
            sot=clip.tokenizer.bos_token_id,
            eot=clip.tokenizer.eos_token_id,
            sentence_ends=sentence_end_ids(clip.tokenizer),
            limit=limit,
            overlap=overlap,
            min_tokens=min_tokens,
            eot_in_segment=query == "state",
        )

    @property
    def query_settings(self) -> dict[str, Any]:
        """The QUERY_SETTINGS, on which queries depend besides CLIP and tokenizer."""
        precision = str(self.tower.dtype).removeprefix("torch.")
        values = (self.query, self.rule.overlap, self.rule.min_tokens, precision)
        return dict(zip(QUERY_SETTINGS, values, strict=True))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) float32, L2-normalised; zeros for padding and at the first token of a document.

        Args:
            input_ids: (B, T) int64 ids of the tokenizer.
            attention_mask: (B, T), 0 for padding; None: no padding.

        Raises:
            ValueError: a wrong shape, dtype or id.
        """
        return self.encode(self.runs(input_ids, attention_mask), input_ids.shape)

    def runs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Run]:
        """The segments of a batch, for `encode`. Arguments and errors are those of `__call__`."""
        tokens = self._tokens(input_ids, attention_mask)
        readings = [self._read(row, of_row, SegmentState(), TextState()) for row, of_row in enumerate(tokens)]
        return [run for reading in readings for run in reading.runs + reading.forks]

    @torch.no_grad()
    def encode(self, runs: list[Run], shape: tuple[int, ...]) -> Tensor:
        """Queries (B, T, E) for `shape` (B, T), zeros at positions that `runs` do not ask for."""
        queries = self._zeros(shape)
        with in_own_precision(queries.device):
            for some in _calls(runs, self._most()):
                self._encode(some, queries)
        return queries

    def new_cache(self, batch: int) -> ContextCache:
        """An empty cache for `step`, for `batch` rows of text."""
        return ContextCache(batch, self.tower, self.clip.embed_dim)

    def step(self, input_ids: Tensor, cache: ContextCache, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) float32 of the next T tokens of each row; `cache` holds the earlier tokens.

        Pass a whole prompt first, then one token at a time. Other arguments and errors are those of `__call__`.
        """
        return self.encode_next(self.next_runs(input_ids, cache, attention_mask), input_ids.shape, cache)

    def next_runs(self, input_ids: Tensor, cache: ContextCache, attention_mask: Tensor | None = None) -> list[Run]:
        """The segments of the next tokens, for `encode_next`, which must follow. Arguments are those of `step`."""
        runs = []
        for row, of_row in enumerate(self._tokens(input_ids, attention_mask, rows=len(cache.states))):
            reading = self._read(row, of_row, cache.states[row], cache.texts[row])
            cache.states[row] = reading.kept
            runs += reading.runs + reading.forks
        return runs

    @torch.no_grad()
    def encode_next(self, runs: list[Run], shape: tuple[int, ...], cache: ContextCache) -> Tensor:
        """As `encode`, for `runs` of `next_runs`. Runs that are `whole` may be left out, as no cache needs them."""
        queries = self._zeros(shape)
        new: list[Run] = []
        going_on: list[Run] = []
        for run in runs:
            for position, at in run.wanted:
                if at < 0:
                    queries[run.row, position] = cache.last_query[run.row]
            if run.ids:
                (going_on if run.start else new).append(run)
            else:  # a run without tokens: its branches continue from the cache
                going_on += run.branches
        # runs that read the cache come first, because others may overwrite it
        with in_own_precision(queries.device):
            for some in _calls(going_on, CALL_TOKENS) + _calls(new, self._most()):
                self._encode(some, queries, cache)
        return queries

    def _read(self, row: int, tokens: list[tuple[int, int]], state: SegmentState, text: TextState) -> Reading:
        """Cuts the tokens of a row into runs. Changes `text`; the new state is in the result."""
        reading = Reading(row, state, self.rule)
        if self.alignment is not None:
            self.alignment.read(tokens, text, reading)
        else:
            for position, id in tokens:
                first = id == self.rule.sot or not reading.state.open
                reading.add(id)
                if not first:
                    reading.want(position)
            reading.keep()
        return reading

    def _tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, rows: int | None = None
    ) -> list[list[tuple[int, int]]]:
        """(position, id) of each row's tokens without padding; `rows`: the number of rows in an earlier call."""
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids must be (B, T) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        if rows is not None and len(input_ids) != rows:
            raise ValueError(f"input_ids has {len(input_ids)} rows, the cache {rows}: they must be equal")
        tokens = [list(enumerate(row)) for row in input_ids.tolist()]
        if attention_mask is not None:
            masks = attention_mask.tolist()
            tokens = [
                [token for token, real in zip(row, mask, strict=True) if real]
                for row, mask in zip(tokens, masks, strict=True)
            ]
        wrong = next((id for row in tokens for _, id in row if not 0 <= id < self.num_ids), None)
        if wrong is not None:
            raise ValueError(f"input_ids contains {wrong}, but {self._whose_ids} has {self.num_ids} tokens")
        return tokens

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(*shape, self.clip.embed_dim, dtype=torch.float32, device=self.tower.positions.device)

    def _most(self) -> int:
        """The most tokens of a call that reads new segments."""
        most = CPU_CALL_TOKENS if self.tower.positions.device.type == "cpu" else CALL_TOKENS
        return most // 2 if self.query == "eot" else most

    def _encode(self, runs: list[Run], queries: Tensor, cache: ContextCache | None = None) -> None:
        """Encodes runs, either all new or all continuing from the cache, and then their branches."""
        bucket = _Bucket(runs, queries.device)
        past = None
        if cache is not None and bucket.longest:
            past = cache.past[..., cache.capacity - bucket.longest :, :]
            rows = [run.row for run in runs]
            if rows != list(range(len(cache.states))):
                past = past[:, :, torch.tensor(rows, device=queries.device)]
        branches = [(n, branch) for n, run in enumerate(runs) for branch in run.branches]
        step = cache is not None
        present = self._run(bucket, queries, past, cache, keep=step or bool(branches), step=step)
        if not branches:
            return
        if past is not None:
            present = torch.cat([past, present], 4)
        parent = {id(branch): n for n, branch in branches}
        for some in _calls([branch for _, branch in branches], CALL_TOKENS):
            branched = _Bucket(some, queries.device)
            n = torch.tensor([parent[id(branch)] for branch in some], device=queries.device)
            # a branch's past is at the end; first_key hides the entries before it, which longer branches use
            first = torch.tensor([bucket.first[parent[id(branch)]] for branch in some], device=n.device)
            own = torch.tensor(branched.first, device=n.device)
            place = (first - own)[:, None] + torch.arange(branched.longest, device=n.device)
            row, place = n[:, None], place.clamp(min=0)  # (branches, 1), (branches, P)
            past = present.transpose(3, 4)[:, :, row, place].transpose(3, 4)
            self._run(branched, queries, past, step=step)

    def _run(
        self,
        bucket: _Bucket,
        queries: Tensor,
        past: Tensor | None,
        cache: ContextCache | None = None,
        keep: bool = False,
        step: bool = False,
    ) -> Tensor:
        """Runs `bucket` after `past`. Writes the wanted queries into `queries` (B, T, E), and later context into the
        cache. Returns the keys and values of its tokens if `keep`. `step` is as in `TextTower.run`."""
        runs = list(zip(bucket.begins, bucket.runs, strict=True))
        wanted = [(begin + at, run.row, position) for begin, run in runs for position, at in run.wanted if at >= 0]
        last = [(begin + run.kept - 1, run.row) for begin, run in runs if cache is not None and run.kept]
        asked = sorted({token for token, *_ in wanted + last})
        number = {token: n for n, token in enumerate(asked)}
        reads_eot = self.query == "eot" and bool(asked)
        states, present = self.tower.run(
            bucket.ids,
            bucket.lengths,
            positions=bucket.positions,
            eot_after=asked if reads_eot else None,
            first_key=bucket.first_key,
            past=past,
            keep=keep,
            step=step,
        )
        found = self.tower.project(states if reads_eot else states[asked])  # (A, E)
        if wanted:
            places = [(number[token], row, position) for token, row, position in wanted]
            n, row, position = torch.tensor(places, device=queries.device).T
            queries[row, position] = found[n]
        if cache is not None and last:
            kept = [(n, at, run.row, run.start + at) for n, run in enumerate(bucket.runs) for at in range(run.kept)]
            n, at, row, place = torch.tensor(kept, device=queries.device).T
            cache.past[:, :, row, :, cache.capacity - 1 - place] = present[:, :, n, :, at]
            n, row = torch.tensor([(number[token], row) for token, row in last], device=queries.device).T
            cache.last_query[row] = found[n]
        return present


class _Bucket:
    """Runs that the text tower reads in one call: all new, or all continuing from at most `longest` cached tokens.

    Token `at` of run n is number begins[n] + at of ids (T,). The keys of the first p tokens of its segment, including
    cached tokens, are first[n] to first[n] + p - 1 of row n.
    """

    def __init__(self, runs: list[Run], device: torch.device):
        self.runs = runs
        self.lengths = [len(run.ids) for run in runs]
        self.begins = list(itertools.accumulate(self.lengths[:-1], initial=0))
        self.longest = max(run.start for run in runs)
        self.first = [self.longest - run.start for run in runs]
        # None if every token sees all tokens before it, which is faster
        self.first_key = self.first if any(self.first) else None
        tokens = [(id, run.start + at) for run in runs for at, id in enumerate(run.ids)]
        self.ids, self.positions = torch.tensor(tokens, device=device).T  # (T,)


def _calls(runs: list[Run], most: int) -> list[list[Run]]:
    """Splits runs into calls of at most `most` tokens, including cached tokens that they see, or of a single run.

    The runs of a call have similar lengths, so that padding at most doubles what the attention reads.
    """
    calls: list[list[Run]] = []
    count = tokens = cached = 0  # in the last call: runs, their tokens, and the most cached tokens of a run
    for run in sorted(runs, key=lambda run: (-len(run.ids), -run.start)):
        first = calls[-1][0] if calls else run
        count, tokens, cached = count + 1, tokens + len(run.ids), max(cached, run.start)
        padded = count * len(first.ids)
        if not calls or padded > 2 * tokens or padded + count * cached > most:
            calls.append([])
            count, tokens, cached = 1, len(run.ids), run.start
        calls[-1].append(run)
    return calls
