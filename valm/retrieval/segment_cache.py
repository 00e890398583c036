"""Caches the images of segments.

A token's query depends on its segment alone, so equal segments have equal images anywhere.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from valm_kernels.locks import Lock

Nearest = tuple[Tensor, Tensor]  # ids (n, K) int64 and scores (n, K) float32 of a segment's tokens


class SegmentCache:
    """A cache that evicts the least recently used segments first. Threads may share it.

    capacity: tokens whose images are cached, 12 K bytes each; 0 caches none.
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
        """Share of the tokens found in the cache, 0 before the first."""
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
