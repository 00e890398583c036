"""From token ids to images: a query per token, the K nearest images in the knowledge base, each vector once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from valm.clip.tokenizer import padded, prompt_ids
from valm.errors import ValmError
from valm.knowledge_base.format import StoredImage
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextCache, ContextEncoder
from valm.retrieval.faiss_index import open_index
from valm.retrieval.segments import Run
from valm_kernels import MAX_TOPK, TopK
from valm_kernels.locks import Lock

# 50 MB at K = 4.
CACHE_TOKENS = 1 << 20

Nearest = tuple[Tensor, Tensor]  # ids (n, K) int64 and scores (n, K) float32 of a segment's tokens


class Retrieved(NamedTuple):
    """The images of a batch of tokens, as `visual_fusion_attn` takes them in its pooled layout.

    Attributes:
        image_pool: (U, E) float32, the vectors of all images of the batch, each once.
        image_index: (B, T, K) int64, the K images of each token as rows of the pool, best first; -1 = no image.
        image_ids: (U,) int64, the id in the knowledge base of each row of the pool.
        scores: (B, T, K) float32, inner product of query and image; -inf = no image.
    """

    image_pool: Tensor
    image_index: Tensor
    image_ids: Tensor
    scores: Tensor


class VectorIndex(Protocol):
    """Searches the vectors of a knowledge base: `FlatIPIndex`, `FaissIndex`, `ShardedIndex`, or your own class."""

    def search(self, queries: Tensor, k: int) -> TopK:
        """The `k` best images for each query (..., E): scores, and ids in the knowledge base (-1 = none)."""
        ...


class ImageRetriever(Protocol):
    """Finds the images of a model: `Retriever`, `BlindRetriever`, or your own class.

    Cached generation calls `start`, which makes the state, and `step`, which changes it in place.
    """

    @property
    def k(self) -> int:
        """K, the images per token."""
        ...

    @property
    def dim(self) -> int:
        """E, the width of the vectors."""
        ...

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        """Images for every token (B, T) of a batch."""
        ...

    def start(self, batch: int) -> ContextCache:
        """The state before the first token of `batch` rows."""
        ...

    def step(self, input_ids: Tensor, state: ContextCache, attention_mask: Tensor | None = None) -> Retrieved:
        """Images for the next tokens (B, T) of each row."""
        ...


class SegmentCache:
    """Caches the images of segments, and evicts the least recently used segments first. Threads may share it.

    A token's query depends only on its segment, so equal segments have equal images anywhere.

    capacity: number of tokens whose images are cached, 12 K bytes each; 0 caches none.
    `hits` and `misses` count tokens.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tokens = 0
        self.hits = 0
        self.misses = 0
        self._segments: OrderedDict[bytes, Nearest] = OrderedDict()
        self._lock = Lock()

    @property
    def hit_rate(self) -> float:
        """Share of the tokens found in the cache; 0 before the first token."""
        return self.hits / max(1, self.hits + self.misses)

    def clear(self) -> None:
        """Evicts all segments."""
        with self._lock:
            self._segments.clear()
            self.tokens = 0

    def get(self, key: bytes) -> Nearest | None:
        with self._lock:
            if key in self._segments:
                self._segments.move_to_end(key)
            return self._segments.get(key)

    def put(self, key: bytes, nearest: Nearest) -> None:
        """Caches a segment, unless another thread has cached it meanwhile."""
        with self._lock:
            if key in self._segments:
                return
            self._segments[key] = nearest
            self.tokens += len(nearest[0])
            while self.tokens > self.capacity:
                _, (ids, _) = self._segments.popitem(last=False)
                self.tokens -= len(ids)

    def count(self, hits: int, misses: int) -> None:
        """Adds tokens to `hits` and `misses`."""
        with self._lock:
            self.hits += hits
            self.misses += misses


class Retriever:
    """Finds the `k` images of `kb` nearest to the context query of every token.

    `retriever(input_ids)` returns the images of a batch as a `Retrieved`: image_pool (U, E), image_index (B, T, K),
    image_ids (U,) and scores (B, T, K). Threads may share a retriever and call any of its methods at once, if its
    `index` allows it. A state from `start` belongs to one thread at a time.

    Args:
        encoder: makes the query of every token.
        kb: the knowledge base, built with the encoder's CLIP.
        k: K, images per token.
        index: searches the vectors. By default the faiss index of the knowledge base if there is one, otherwise exact
            search (`valm.retrieval.faiss_index.open_index`).
        cache_tokens: results cached across batches, in tokens; 0 deduplicates only within a batch. `cache` counts hits.

    Raises:
        ValmError: the knowledge base was built with another CLIP or has fewer than `k` images, or `index` has another
            number of vectors or belongs to another knowledge base.

    Example:
        >>> kb = valm.ImageKnowledgeBase.open("kb")
        >>> retriever = valm.Retriever(valm.ContextEncoder(kb.load_clip()), kb, k=2)
        >>> retriever(["a red apple"]).scores.shape  # B T K
        torch.Size([1, ..., 2])
        >>> sorted(item.uri for score, item in retriever.search("a red apple", k=3))
        ['blue.png', 'green.png', 'red.png']
    """

    def __init__(
        self,
        encoder: ContextEncoder,
        kb: ImageKnowledgeBase,
        k: int,
        index: VectorIndex | None = None,
        cache_tokens: int = CACHE_TOKENS,
    ):
        kb.check_encoder(encoder.clip)
        check_k(k, kb)
        _check_index(index, kb)
        self._arguments = (encoder, kb, k, index, cache_tokens)
        self.device = encoder.clip.device
        self.encoder = encoder
        self.kb = kb
        self.k = k
        self.index: VectorIndex = open_index(kb, self.device) if index is None else index
        self.cache = SegmentCache(cache_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # another process opens the knowledge base again

    def with_k(self, k: int) -> Retriever:
        """This retriever with another number of images and an empty cache.

        Raises:
            ValmError: the knowledge base has fewer than `k` images.
        """
        check_k(k, self.kb)
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        encoder, kb, _, index, cache_tokens = self._arguments
        other.k, other._arguments = k, (encoder, kb, k, index, cache_tokens)
        other.cache = SegmentCache(cache_tokens)
        return other

    @property
    def dim(self) -> int:
        """E, the width of the vectors."""
        return self.kb.dim

    def __call__(self, input_ids: Tensor | Sequence[str], attention_mask: Tensor | None = None) -> Retrieved:
        """Images for every token of a batch. Arguments and errors are those of `find`."""
        return self._pooled(*self.find(input_ids, attention_mask))

    def retrieve(self, queries: Tensor) -> Retrieved:
        """Images for queries (B, T, E). A query of zeros has no images."""
        return self._pooled(*self.nearest(queries))

    def find(self, input_ids: Tensor | Sequence[str], attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids in the knowledge base (B, T, K) int64, -1 = none, and scores (B, T, K) float32 of a batch of tokens.

        Equal segments are encoded and searched for once, or not at all if their images are cached.

        Args:
            input_ids: (B, T) int64; or a list of texts, which the encoder's tokenizer reads (`prompt_ids`), padded on
                the right.
            attention_mask: as in `ContextEncoder.__call__`.

        Raises:
            ValueError: as `ContextEncoder.__call__`, or a single text instead of a list.
        """
        if isinstance(input_ids, str):
            raise ValueError(f"input_ids must be ids or a list of texts, got a text: give [{input_ids[:20]!r}]")
        if not isinstance(input_ids, Tensor):
            input_ids, attention_mask = padded([prompt_ids(self.encoder.tokenizer, text) for text in input_ids])
        runs = self.encoder.runs(input_ids, attention_mask)
        keys = [run.key() for run in runs]
        known = {key: nearest for key in keys if (nearest := self.cache.get(key)) is not None}
        new = {key: run for key, run in zip(keys, runs, strict=True) if key not in known}
        ids, scores = self.nearest(self.encoder.encode(list(new.values()), input_ids.shape))
        for key, run in new.items():
            known[key] = (ids[run.row, run.positions()], scores[run.row, run.positions()])
            self.cache.put(key, known[key])
        hits = misses = 0
        for key, run in zip(keys, runs, strict=True):
            places = run.positions()
            ids[run.row, places], scores[run.row, places] = known[key]
            if new.get(key) is run:
                misses += len(places)
            else:
                hits += len(places)
        self.cache.count(hits, misses)
        return ids, scores

    def start(self, batch: int) -> ContextCache:
        """The state that `step` continues from, for `batch` rows of text; it has `reorder(beam_idx)`."""
        return self.encoder.new_cache(batch)

    def step(self, input_ids: Tensor, state: ContextCache, attention_mask: Tensor | None = None) -> Retrieved:
        """Images for the next tokens (B, T) of each row; `state` holds the earlier tokens.

        For a prompt of a single row (B = 1), segments that end before its last token are cached, as in `find`, so a
        conversation's next prompt does not encode them again. Each segment is encoded and searched for separately, so
        its images are the same, bit for bit, with or without the cache.
        """
        if len(input_ids) > 1 or input_ids.shape[1] == 1:  # several rows share calls of the text tower
            return self.retrieve(self.encoder.step(input_ids, state, attention_mask))
        runs = self.encoder.next_runs(input_ids, state, attention_mask)
        others = [run for run in runs if not run.whole]
        ids, scores = self.nearest(self.encoder.encode_next(others, input_ids.shape, state))
        for run in runs:
            if run.whole:
                ids[0, run.positions()], scores[0, run.positions()] = self._of_segment(run, input_ids.shape[1])
        return self._pooled(ids, scores)

    def _of_segment(self, run: Run, length: int) -> Nearest:
        """The images of the n positions of a whole run in a row of `length` tokens."""
        key, places = run.key(), run.positions()
        known = self.cache.get(key)
        self.cache.count(*((0, len(places)) if known is None else (len(places), 0)))
        if known is None:
            known = self.nearest(self.encoder.encode([run], (1, length))[0, places])
            self.cache.put(key, known)
        return known

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Ids in the knowledge base (..., K) int64 and scores (..., K) float32 for queries (..., E).

        A query of zeros (padding) has no images: ids -1 and scores -inf.
        """
        shape = (*queries.shape[:-1], self.k)
        ids = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
        scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
        asked = queries.any(-1)
        scores[asked], ids[asked] = self.index.search(queries[asked], self.k)
        return ids, scores

    def search(self, query: str | Image.Image, k: int) -> list[tuple[float, StoredImage]]:
        """The `k` images nearest to CLIP's feature of a text or an image, with their scores, best first.

        Args:
            query: a text, or an image as for `Clip.encode_images`.
            k: number of images; an approximate index may find fewer.

        Returns:
            A list of (score, `StoredImage`): the inner product, and the image's id, uri, caption and size.

        Raises:
            ValmError: `k` is below 1, above the number of images, or above the most results of a search.
        """
        if k > len(self.kb) <= MAX_TOPK:
            k = len(self.kb)
        check_k(k, self.kb)
        clip = self.encoder.clip
        if isinstance(query, str):
            features = clip.encode_texts([query])
        else:
            features = clip.encode_images([query])
        scores, ids = self.index.search(features, k)
        hits = zip(scores[0].tolist(), ids[0].tolist(), strict=True)
        return [(score, self.kb.item(id)) for score, id in hits if id >= 0]

    def _pooled(self, ids: Tensor, scores: Tensor) -> Retrieved:
        image_ids, image_index = torch.unique(ids, return_inverse=True)
        if len(image_ids) and image_ids[0] == -1:  # ascending, so "none" comes first
            image_ids, image_index = image_ids[1:], image_index - 1
        vectors = torch.from_numpy(self.kb.gather(image_ids.cpu().numpy()))
        return Retrieved(vectors.to(ids.device, torch.float32), image_index, image_ids, scores)


class BlindRetriever:
    """The query control, Blind-VaLM (Ontalvilla et al. 2024): a token's query is its only "image"; nothing is searched.

    Used like a `Retriever`. image_ids are all -1, because these images are in no knowledge base. The first token of a
    document has no image, as with a `Retriever`.

    Args:
        cache_tokens: number of tokens whose queries are cached, 4 E bytes each, because training reads its documents in
            every epoch. The first rows stay cached; 0 caches none.
        kb: the score of a token is then the score of its best image in this knowledge base, so that a blind model with
            a `min_score` sees its query where the model with images would see images. None: every score is 1.

    Raises:
        ValmError: the knowledge base was built with another CLIP.
    """

    k = 1

    def __init__(self, encoder: ContextEncoder, cache_tokens: int = 0, kb: ImageKnowledgeBase | None = None):
        self.encoder = encoder
        self.kb = kb
        self._scoring = None if kb is None else Retriever(encoder, kb, 1)
        self.cache_tokens = cache_tokens
        self._rows: dict[tuple[int, ...], Tensor] = {}  # queries by the ids of a row
        self._room = cache_tokens

    @property
    def dim(self) -> int:
        """E, the width of the queries."""
        return self.encoder.clip.embed_dim

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        """The query of every token of a batch. Arguments and errors are those of `ContextEncoder.__call__`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.cache_tokens == 0 or mask.shape != input_ids.shape:  # the encoder rejects another shape
            return self._pooled(self.encoder(input_ids, attention_mask))
        input_ids, mask = (tensor.to(self.encoder.clip.device) for tensor in (input_ids, mask))
        real = mask.bool()
        texts = [tuple(ids[here].tolist()) for ids, here in zip(input_ids, real, strict=True)]
        new = [row for row, ids in enumerate(texts) if ids not in self._rows]
        queries = torch.zeros(*input_ids.shape, self.dim, device=input_ids.device)
        if new:
            queries[new] = self.encoder(input_ids[new], mask[new])
        for row in new:
            ids = texts[row]
            if ids not in self._rows and len(ids) <= self._room:
                self._rows[ids] = queries[row, real[row]]
                self._room -= len(ids)
        for row in set(range(len(texts))) - set(new):
            queries[row, real[row]] = self._rows[texts[row]]
        return self._pooled(queries)

    def start(self, batch: int) -> ContextCache:
        """The state that `step` continues from, for `batch` rows of text; it has `reorder(beam_idx)`."""
        return self.encoder.new_cache(batch)

    def step(self, input_ids: Tensor, state: ContextCache, attention_mask: Tensor | None = None) -> Retrieved:
        """The queries of the next tokens (B, T) of each row; `state` holds the earlier tokens."""
        return self._pooled(self.encoder.step(input_ids, state, attention_mask))

    def _pooled(self, queries: Tensor) -> Retrieved:
        asked = queries.any(-1)  # (B, T): the query is zeros for padding and the first token of a document
        pool = queries[asked]  # (U, E)
        index = torch.full(asked.shape, -1, device=queries.device)
        index[asked] = torch.arange(len(pool), device=queries.device)
        if self._scoring is None:  # the inner product of a normalised query with itself
            scores = torch.ones((*asked.shape, 1), device=queries.device)
        else:
            _, scores = self._scoring.nearest(queries)
        scores = scores.masked_fill(~asked[..., None], -torch.inf)
        return Retrieved(pool, index[..., None], torch.full((len(pool),), -1, device=queries.device), scores)


class NoImages:
    """A retriever that finds nothing, so that a model of `k` images per token reads only the text.

    Used like a `Retriever`, also by a model of the query control (Blind).
    """

    def __init__(self, k: int, dim: int):
        self.k = k
        self.dim = dim

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        """No image for any token (B, T)."""
        shape = (*input_ids.shape, self.k)
        return Retrieved(
            torch.empty(0, self.dim, device=input_ids.device),
            torch.full(shape, -1, device=input_ids.device),
            torch.empty(0, dtype=torch.int64, device=input_ids.device),
            torch.full(shape, -torch.inf, device=input_ids.device),
        )

    def start(self, batch: int) -> Any:
        """The empty state of `batch` rows."""
        return _NoState()

    def step(self, input_ids: Tensor, state: Any, attention_mask: Tensor | None = None) -> Retrieved:
        """No image for the next tokens (B, T)."""
        return self(input_ids, attention_mask)


class _NoState:
    def reorder(self, beam_idx: Tensor) -> None:
        pass

    def join(self, other: Any) -> None:
        pass


def _check_index(index: Any, kb: ImageKnowledgeBase) -> None:
    """Checks that an index belongs to `kb`, if it says so, and has as many vectors."""
    of = getattr(index, "kb", None)
    if isinstance(of, ImageKnowledgeBase) and of.fingerprint != kb.fingerprint:
        raise ValmError(f"the index belongs to the knowledge base {of.path}, not to {kb.path}")
    if hasattr(index, "__len__") and len(index) != len(kb):
        raise ValmError(f"the index has {len(index):,} vectors, but the knowledge base {kb.path} has {len(kb):,}")


def check_k(k: int, kb: ImageKnowledgeBase) -> None:
    """Raises ValmError unless a search of `kb` can find the `k` nearest images."""
    if 1 <= k <= min(len(kb), MAX_TOPK):
        return
    images = f"{len(kb):,} images of {kb.path}"
    if len(kb) <= MAX_TOPK:
        raise ValmError(f"k must be from 1 to the {images}, got {k:,}")
    raise ValmError(f"k must be from 1 to {MAX_TOPK:,}, got {k:,}: a search returns no more of the {images}")
