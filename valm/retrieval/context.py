"""One query per token from CLIP's text tower, without looking ahead."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from valm.retrieval.alignment import Alignment, TextState
from valm.retrieval.clip import Clip
from valm.retrieval.segments import Reading, Run, SegmentRule, SegmentState, sentence_end_ids
from valm.retrieval.text_tower import KeyValues, TextTower

QUERIES = ("eot", "state")

# Tokens that open each segment for the second time. On running prose (LAMBADA) and a context of 77 tokens the text
# tower then reads 1.27 tokens for each token of the text, with 16 it would be 1.35: "state" queries of an
# RN50x16-size tower would cost as much as a GPT-2 base forward pass (now 0.89 of it).
OVERLAP = 12

# Runs of one call of the text tower: padded to the longest, so their lengths may differ by this much only, and no
# more tokens at once than this, so that memory stays bounded however large the batch is.
BUCKET_SPREAD = 8
BUCKET_TOKENS = 8192


class ContextCache:
    """What incremental encoding keeps of each row: where its segment stands, and that segment's keys and values.

    Make one with `ContextEncoder.new_cache`. It is changed in place by `ContextEncoder.step`.
    """

    def __init__(self, batch: int, tower: TextTower, embed_dim: int):
        like = tower.positions
        # SOT and the tokens of a segment; its EOT is never looked at by another token. Token p of a segment stands
        # in place capacity-1-p: the last P places are then always the tokens before the next one.
        self.capacity = len(like) - 1
        shape = (batch, tower.heads, self.capacity, tower.head_dim)
        self.states = [SegmentState() for _ in range(batch)]
        self.texts = [TextState() for _ in range(batch)]  # used where the ids are not the CLIP's
        self.past: KeyValues = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in tower.blocks]
        self.last_query = torch.zeros(batch, embed_dim, device=like.device)  # float32, of the last token kept

    def reorder(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i], (new batch,) int64: beam search."""
        self.states = [self.states[row].copy() for row in beam_idx.tolist()]
        self.texts = [self.texts[row].copy() for row in beam_idx.tolist()]
        index = beam_idx.to(self.last_query.device)
        self.past = [(keys[index], values[index]) for keys, values in self.past]
        self.last_query = self.last_query[index]


class ContextEncoder:
    """Queries for retrieval: what CLIP makes of the text up to each token.

    clip: the CLIP; its text tower must be causal (`TextTower` says which are refused, with ValmError).
    tokenizer: whose ids it is given, by default the CLIP's own. Another one is read as `Alignment` says (and
        refuses): a token's query is then that of the text up to its last character, cut as CLIP would cut it.
    query: "eot" is CLIP's own text feature of each prefix, as if EOT stood after it: the state CLIP was
        trained for. "state" is the tower's state at the token itself, as published (Wang et al. 2022, section 2.2).
    overlap, min_tokens: see `SegmentRule`; by default OVERLAP or a quarter of a segment, and half a segment.
    dtype: precision of the text tower, float32, bfloat16 or float64; queries are float32 whatever it is.

    A token's query depends on the tokens before it and itself alone: it is the same (to rounding) in any batch, with
    any padding, at the end of a prefix, and token by token. bos (SOT) in the ids begins a document and eos (EOT) ends
    one; text without bos is read as if it had one. The query at eos is that of the whole text, in both kinds.
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
        self.tokenizer = clip.tokenizer if tokenizer is None else tokenizer
        self.query = query
        self.tower = TextTower(clip, dtype)
        self.alignment = None
        self.num_ids = self.tower.embedding.num_embeddings
        if self.tokenizer.get_vocab() != clip.tokenizer.get_vocab():
            self.alignment = Alignment(self.tokenizer, clip.tokenizer)
            self.num_ids = len(self.tokenizer)
        self.rule = SegmentRule(
            sot=clip.tokenizer.bos_token_id,
            eot=clip.tokenizer.eos_token_id,
            sentence_ends=sentence_end_ids(clip.tokenizer),
            limit=limit,
            overlap=overlap,
            min_tokens=min_tokens,
            eot_in_segment=query == "state",
        )

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) float32, L2-normalised, zeros where attention_mask (B, T) is 0.

        input_ids: (B, T) int64 ids of the tokenizer. Raises ValueError for other shapes, types and ids.
        """
        return self.encode(self.runs(input_ids, attention_mask), input_ids.shape)

    def runs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Run]:
        """The segments of a batch, to be encoded: what `encode` takes. Arguments and errors as in `__call__`."""
        tokens = self._tokens(input_ids, attention_mask)
        readings = [self._read(row, of_row, SegmentState(), TextState()) for row, of_row in enumerate(tokens)]
        return [run for reading in readings for run in reading.runs + reading.forks]

    @torch.no_grad()
    def encode(self, runs: list[Run], shape: tuple[int, int]) -> Tensor:
        """Queries (B, T, E) of `shape` (B, T), zeros where `runs` ask for none."""
        queries = self._zeros(shape)
        for bucket in _buckets(runs):
            self._encode(bucket, queries)
        return queries

    def new_cache(self, batch: int) -> ContextCache:
        """An empty cache for `batch` rows of text, to be read by `step`."""
        return ContextCache(batch, self.tower, self.clip.embed_dim)

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: ContextCache, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) of the next T tokens of each row; what came before is in `cache`.

        A prompt goes in whole, then one token at a time. Arguments and errors otherwise as in `__call__`.
        """
        tokens = self._tokens(input_ids, attention_mask)
        if len(tokens) != len(cache.states):
            raise ValueError(f"input_ids has {len(tokens)} rows, the cache {len(cache.states)}")
        queries = self._zeros(input_ids.shape)
        new, going_on = [], []
        for row, of_row in enumerate(tokens):
            reading = self._read(row, of_row, cache.states[row], cache.texts[row])
            cache.states[row] = reading.kept
            for run in reading.runs + reading.forks:
                for position, at in run.wanted:
                    if at < 0:
                        queries[row, position] = cache.last_query[row]
                if run.ids:
                    (going_on if run.start else new).append(run)
                else:  # nothing of its own to run, so its branches go on from the cache
                    going_on += run.branches
        # first those that read the cache, as the others may write over what they look at
        for bucket in _buckets(going_on) + _buckets(new):
            self._encode(bucket, queries, cache)
        return queries

    def _read(self, row: int, tokens: list[tuple[int, int]], state: SegmentState, text: TextState) -> Reading:
        """Cuts the tokens of a row into runs. Changes `text`; the new state is in the result."""
        reading = Reading(row, state, self.rule)
        if self.alignment is not None:
            self.alignment.read(tokens, text, reading)
        else:
            for position, id in tokens:
                reading.add(id)
                reading.want(position)
            reading.keep()
        return reading

    def _tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[list[tuple[int, int]]]:
        """(position, id) of the tokens of each row that are not padding."""
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids must be (B, T) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        rows = [list(enumerate(row)) for row in input_ids.tolist()]
        if attention_mask is not None:
            masks = attention_mask.tolist()
            rows = [
                [token for token, real in zip(row, mask, strict=True) if real]
                for row, mask in zip(rows, masks, strict=True)
            ]
        wrong = next((id for row in rows for _, id in row if not 0 <= id < self.num_ids), None)
        if wrong is not None:
            whose = f"the CLIP {self.clip.name}" if self.alignment is None else "the tokenizer"
            raise ValueError(f"input_ids has {wrong}, but {whose} has {self.num_ids} pieces")
        return rows

    def _zeros(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(*shape, self.clip.embed_dim, device=self.tower.positions.device)

    def _encode(self, bucket: list[Run], queries: Tensor, cache: ContextCache | None = None) -> None:
        """Runs a bucket of runs, all of them new or all going on from the cache, and then their branches."""
        start, past = None, None
        if bucket[0].start:
            rows = torch.tensor([run.row for run in bucket], device=queries.device)
            start = torch.tensor([run.start for run in bucket], device=queries.device)
            longest = max(run.start for run in bucket)
            past = [tuple(kept[rows, :, cache.capacity - longest :] for kept in layer) for layer in cache.past]
        present = self._run(bucket, queries, start, past, cache)
        branches = [(n, branch) for n, run in enumerate(bucket) for branch in run.branches]
        if not branches:
            return
        if past is not None:
            present = [
                tuple(torch.cat(both, 2) for both in zip(*layers, strict=True))
                for layers in zip(past, present, strict=True)
            ]
        # Token p of a run that goes on from S tokens stands in place longest - S + p: a branch's past ends in
        # longest - S + its own start, and what a longer one's has before its first place is not looked at.
        before = 0 if past is None else longest
        parent = {id(branch): n for n, branch in branches}
        for some in _buckets([branch for _, branch in branches], spread=0):
            n = torch.tensor([parent[id(branch)] for branch in some], device=queries.device)
            start = torch.tensor([branch.start for branch in some], device=queries.device)
            reach = int(start.max())
            first = before - torch.tensor([bucket[i].start for i in n.tolist()], device=queries.device) + start - reach
            place = (first[:, None] + torch.arange(reach, device=queries.device)).clamp(min=0)  # (branches, P)
            past = [
                tuple(part.transpose(1, 2)[n[:, None], place].transpose(1, 2) for part in layer) for layer in present
            ]
            self._run(some, queries, start, past)

    def _run(
        self,
        bucket: list[Run],
        queries: Tensor,
        start: Tensor | None,
        past: KeyValues | None,
        cache: ContextCache | None = None,
    ) -> KeyValues:
        """Runs `bucket` behind `past`, puts the queries (B, T, E) asked for into place and keeps what is to be kept.
        Returns the keys and values of its tokens."""
        length = max(len(run.ids) for run in bucket)
        ids = torch.tensor(
            [run.ids + [self.rule.eot] * (length - len(run.ids)) for run in bucket], device=queries.device
        )
        states, present = self.tower.run(ids, eot_stream=self.query == "eot", start=start, past=past)
        wanted = [(n, at, run.row, position) for n, run in enumerate(bucket) for position, at in run.wanted if at >= 0]
        if wanted:
            n, at, row, position = torch.tensor(wanted, device=queries.device).T
            queries[row, position] = self.tower.project(states[n, at])
        kept = [(n, run) for n, run in enumerate(bucket) if run.kept]
        if cache is not None and kept:
            n, at, row = torch.tensor([(n, run.kept - 1, run.row) for n, run in kept], device=queries.device).T
            cache.last_query[row] = self.tower.project(states[n, at])
            places = [
                (n, at, run.row, cache.capacity - 1 - run.start - at) for n, run in kept for at in range(run.kept)
            ]
            n, at, row, place = torch.tensor(places, device=queries.device).T
            for layer, new in zip(cache.past, present, strict=True):
                for part, new_part in zip(layer, new, strict=True):
                    part[row, :, place] = new_part[n, :, at]
        return present


def _buckets(runs: list[Run], spread: int = BUCKET_SPREAD) -> list[list[Run]]:
    """Runs of like length together, within `spread` and BUCKET_TOKENS, what they look back at counted too."""
    buckets: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (-len(run.ids), -run.start)):
        first = buckets[-1][0] if buckets else run
        tokens = len(first.ids) + first.start
        if not buckets or len(first.ids) - len(run.ids) > spread or tokens * (len(buckets[-1]) + 1) > BUCKET_TOKENS:
            buckets.append([])
        buckets[-1].append(run)
    return buckets
