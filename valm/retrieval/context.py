"""One query per token from CLIP's text tower, without looking ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from valm.retrieval.clip import Clip
from valm.retrieval.segments import Run, SegmentRule, SegmentState, sentence_end_ids
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
        self.past: KeyValues = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in tower.blocks]
        self.last_query = torch.zeros(batch, embed_dim, device=like.device)  # float32

    def reorder(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i], (new batch,) int64: beam search."""
        self.states = [self.states[row].copy() for row in beam_idx.tolist()]
        index = beam_idx.to(self.last_query.device)
        self.past = [(keys[index], values[index]) for keys, values in self.past]
        self.last_query = self.last_query[index]


class ContextEncoder:
    """Queries for retrieval: what CLIP makes of the text up to each token.

    clip: the CLIP; its text tower must be causal (`TextTower` says which are refused, with ValmError).
    query: "eot" is CLIP's own text feature of each prefix, as if EOT stood after it: the state CLIP was
        trained for. "state" is the tower's state at the token itself, as published (Wang et al. 2022, section 2.2).
    overlap, min_tokens: see `SegmentRule`; by default OVERLAP or a quarter of a segment, and half a segment.
    dtype: precision of the text tower, float32, bfloat16 or float64; queries are float32 whatever it is.

    A token's query depends on the tokens before it and itself alone: it is the same (to rounding) in any batch, with
    any padding, at the end of a prefix, and token by token. SOT in the ids begins a document and EOT ends one; text
    without SOT is read as if it had one. The query at EOT is that of the whole text, in both kinds.
    """

    def __init__(
        self,
        clip: Clip,
        *,
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
        self.tokenizer = clip.tokenizer
        self.query = query
        self.tower = TextTower(clip, dtype)
        self.rule = SegmentRule(
            sot=clip.tokenizer.bos_token_id,
            eot=clip.tokenizer.eos_token_id,
            sentence_ends=sentence_end_ids(clip.tokenizer),
            limit=limit,
            overlap=overlap,
            min_tokens=min_tokens,
            eot_in_segment=query == "state",
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) float32, L2-normalised, zeros where attention_mask (B, T) is 0.

        input_ids: (B, T) int64 ids of the CLIP's tokenizer. Raises ValueError for other shapes, types and ids.
        """
        tokens = self._tokens(input_ids, attention_mask)
        runs = [run for row, row_tokens in enumerate(tokens) for run in SegmentState().read(row, row_tokens, self.rule)]
        queries = self._zeros(input_ids)
        for bucket in _buckets(runs):
            ids = self._padded_ids(bucket)
            states, _ = self.tower.run(ids, eot_stream=self.query == "eot")
            self._place(queries, states, bucket)
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
        runs, going_on = [], []
        for row, row_tokens in enumerate(tokens):
            of_row = cache.states[row].read(row, row_tokens, self.rule)
            going_on += of_row[:1] if of_row and of_row[0].start else []
            runs += of_row[1:] if of_row and of_row[0].start else of_row
        queries = self._zeros(input_ids)
        # EOT alone after an earlier call has the query of the token before it, and nothing to run
        for run in going_on:
            for position, at in run.wanted:
                if at < 0:
                    queries[run.row, position] = cache.last_query[run.row]
        for bucket in [*_buckets([run for run in going_on if run.ids]), *_buckets(runs)]:
            ids = self._padded_ids(bucket)
            start, past = None, None
            if bucket[0].start:
                rows = torch.tensor([run.row for run in bucket], device=ids.device)
                start = torch.tensor([run.start for run in bucket], device=ids.device)
                longest = max(run.start for run in bucket)
                past = [tuple(kept[rows, :, cache.capacity - longest :] for kept in layer) for layer in cache.past]
            states, present = self.tower.run(ids, eot_stream=self.query == "eot", start=start, past=past)
            self._place(queries, states, bucket)
            self._keep(cache, queries, present, bucket)
        return queries

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
        pieces = self.tower.embedding.num_embeddings
        wrong = next((id for row in rows for _, id in row if not 0 <= id < pieces), None)
        if wrong is not None:
            raise ValueError(f"input_ids has {wrong}, but the CLIP {self.clip.name} has {pieces} pieces")
        return rows

    def _zeros(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, self.clip.embed_dim, device=self.tower.positions.device)

    def _padded_ids(self, bucket: list[Run]) -> Tensor:
        """ids (N, T) of the runs, filled up on the right."""
        length = max(len(run.ids) for run in bucket)
        rows = [run.ids + [self.rule.eot] * (length - len(run.ids)) for run in bucket]
        return torch.tensor(rows, device=self.tower.positions.device)

    def _place(self, queries: Tensor, states: Tensor, bucket: list[Run]) -> None:
        """Projects the states (N, T, W) that are asked for and puts them into queries (B, T, E)."""
        wanted = [(n, at, run.row, position) for n, run in enumerate(bucket) for position, at in run.wanted if at >= 0]
        n, at, row, position = torch.tensor(wanted, device=states.device).T
        queries[row, position] = self.tower.project(states[n, at])

    @staticmethod
    def _keep(cache: ContextCache, queries: Tensor, present: KeyValues, bucket: list[Run]) -> None:
        """Puts into the cache what later tokens of the bucket's unfinished segments will look at."""
        going_on = [(n, run) for n, run in enumerate(bucket) if run.goes_on]
        if not going_on:
            return
        places = [
            (n, at, run.row, cache.capacity - 1 - run.start - at) for n, run in going_on for at in range(len(run.ids))
        ]
        n, at, row, place = torch.tensor(places, device=queries.device).T
        for kept, new in zip(cache.past, present, strict=True):
            for kept_part, new_part in zip(kept, new, strict=True):
                kept_part[row, :, place] = new_part[n, :, at]
        row, position = torch.tensor([(run.row, run.wanted[-1][0]) for _, run in going_on], device=queries.device).T
        cache.last_query[row] = queries[row, position]


def _buckets(runs: list[Run]) -> list[list[Run]]:
    """Runs of like length together, within BUCKET_SPREAD and BUCKET_TOKENS."""
    buckets: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: -len(run.ids)):
        longest = len(buckets[-1][0].ids) if buckets else 0
        if not buckets or longest - len(run.ids) > BUCKET_SPREAD or longest * (len(buckets[-1]) + 1) > BUCKET_TOKENS:
            buckets.append([])
        buckets[-1].append(run)
    return buckets
