"""Exact search of rows that stay in host memory, streamed in chunks through a device that cannot hold them all.

While the device searches one chunk, the host copies the next chunk into pinned memory, and a separate stream copies it
to the device. Host and device hold two buffers each. Events mark when a buffer is full and when it may be overwritten.
Buffers pad E with zeros as the CUDA kernels need, which changes no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from .cuda import DIM_MULTIPLE, aligned
from .result import TopK, merge_topk

# Bytes of one buffer: two are pinned in host memory, two are on the device.
CHUNK_BYTES = 64 << 20


class _Buffer:
    """A chunk's buffers in pinned memory and on the device, with the events that order their uses."""

    def __init__(self, sources: list[Tensor], chunk_rows: int, device: torch.device, streams: ModuleType) -> None:
        dim = sources[0].shape[1]
        shapes = [(chunk_rows, dim + -dim % DIM_MULTIPLE), (chunk_rows,)][: len(sources)]
        pinned = device.type == "cuda"
        allocate = torch.zeros if dim % DIM_MULTIPLE else torch.empty  # zeros only for the padding
        self.host = [
            allocate(shape, dtype=source.dtype, pin_memory=pinned)
            for source, shape in zip(sources, shapes, strict=True)
        ]
        self.values = [self.host[0][:, :dim], *self.host[1:]]  # without the padding
        self.device = [torch.empty_like(part, device=device) for part in self.host]
        self.copied, self.searched = streams.Event(), streams.Event()
        # work queued earlier on the current stream may still use this memory
        self.searched.record(streams.current_stream(device))

    def fill(self, chunk: Sequence[Tensor], copies: Any, streams: ModuleType) -> None:
        count = len(chunk[0])
        self.copied.synchronize()
        for part, values in zip(self.values, chunk, strict=True):
            part[:count].copy_(values)
        copies.wait_event(self.searched)
        with streams.stream(copies):
            for there, here in zip(self.device, self.host, strict=True):
                there[:count].copy_(here[:count], non_blocking=True)
            self.copied.record(copies)


def search(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and indices (Q, k) of queries (Q, E), on their device. rows (N, E) and row_scale (N,) are on the CPU,
    allowed (N,) bool is on the device.

    Chunks may be smaller than k. If the device is the CPU, torch's CPU streams are used, which do nothing.
    """
    queries = aligned(queries)
    device = queries.device
    streams = torch.get_device_module(device)
    sources = [rows] if row_scale is None else [rows, row_scale]
    chunk_rows = min(len(rows), max(1, CHUNK_BYTES // (rows.shape[1] * rows.itemsize)))
    chunks = list(zip(*(source.split(chunk_rows) for source in sources), strict=True))
    buffers = [_Buffer(sources, chunk_rows, device, streams) for _ in range(2)]
    searches, copies = streams.current_stream(device), streams.Stream(device)

    buffers[0].fill(chunks[0], copies, streams)
    best: TopK | None = None
    for number, chunk in enumerate(chunks):
        buffer, start, count = buffers[number % 2], number * chunk_rows, len(chunk[0])
        searches.wait_event(buffer.copied)
        here = [part[:count] for part in buffer.device]
        scale = None if row_scale is None else here[1]
        some = None if allowed is None else allowed[start : start + count]
        found = TopK(*ops.ip_topk(queries, here[0], scale, min(k, count), some))
        buffer.searched.record(searches)
        if number + 1 < len(chunks):  # while the device is busy
            buffers[(number + 1) % 2].fill(chunks[number + 1], copies, streams)
        best = found if best is None else merge_topk([best, found], [0, start], min(k, start + count))
    assert best is not None  # a database has at least one row
    return best
