"""Times on paper, on an H100: the floor of each call, our kernels, and the same in PyTorch.

Arithmetic, not measurement. The floor: every tensor crosses the memory bus once, tiles waste nothing, and a call waits
only for its busiest unit. No implementation can be faster. For ours and for PyTorch the same holds of each kernel or
operation, one after the other. So they differ by what they read, compute and launch again, not by how well they use the
GPU, which only a GPU can tell. `python -m benchmarks.report` writes the last table of docs/results/gpu.md from it, and
benchmarks on a GPU print the floor next to their measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers import attention

# NVIDIA H100 SXM5 80 GB (data sheet; without sparsity). Special functions: 16 exp2 per clock and multiprocessor
# (CUDA C++ Programming Guide, arithmetic throughput), 132 multiprocessors, 1.83 GHz.
BYTES_PER_S = 3.35e12
BF16_FLOP_PER_S = 989e12
FLOAT32_FLOP_PER_S = 67e12
EXP_PER_S = 16 * 132 * 1.83e9
# Assumptions without a checked source, to be measured on a GPU: the rate of the second-level cache, and the share of
# the tensor cores' peak that mma.sync reaches, which the search uses. Triton's wgmma is taken to reach the peak.
CACHE_BYTES_PER_S = 6.65e12
MMA_SYNC_SHARE = 0.629

# Not in a data sheet, and to be measured on a GPU: the time from the end of one kernel to the start of the next on its
# stream, and the time of the host. The host's time is the least of six runs of host_time.py on two idle cores of an
# Intel Xeon with AMX, with Triton 3.7.1: a forward without gradients, one of a single query (with a merge), and two
# backwards without biases.
LAUNCH_S = 3e-6
FORWARD_HOST_S = 111e-6
DECODING_HOST_S = 116e-6
BACKWARD_HOST_S = 209e-6
POOLED_BACKWARD_HOST_S = 317e-6
# Of a radix sort in PyTorch beside its passes of 8 bits: conversion, values, histogram and offsets, then arange and
# searchsorted for the segments.
SORT_LAUNCHES = 6


@dataclass(frozen=True)
class Shape:
    """Sizes as in visual_fusion_attn; U images in the pool, 0 in the dense layout; G query heads share a key head.
    16-bit tensors."""

    name: str
    B: int
    H: int
    Tq: int
    Tk: int
    K: int
    D: int
    U: int = 0
    G: int = 1

    @property
    def pairs(self) -> int:
        """Pairs of a query and a text key that it sees, of all heads."""
        return self.B * self.H * (self.Tq * (self.Tk - self.Tq) + self.Tq * (self.Tq + 1) // 2)

    @property
    def image_pairs(self) -> int:
        return self.B * self.H * self.Tq * self.K

    @property
    def query_bytes(self) -> int:
        """q, or anything of its size."""
        return 2 * self.B * self.H * self.Tq * self.D

    @property
    def key_bytes(self) -> int:
        """k, or v."""
        return 2 * self.B * self.H // self.G * self.Tk * self.D

    @property
    def row_bytes(self) -> int:
        """lse, or delta: one float32 per query and head."""
        return 4 * self.B * self.H * self.Tq

    @property
    def image_bytes(self) -> int:
        """image_k, or image_v."""
        return 2 * self.D * (self.H * self.U or self.image_pairs) // self.G

    @property
    def image_grad_bytes(self) -> int:
        """What the kernel over queries writes for the images: their gradients, or two float32 coefficients per slot and
        head of a pool."""
        return 8 * self.image_pairs if self.U else 2 * self.image_bytes

    @property
    def index_bytes(self) -> int:
        return 8 * self.B * self.Tq * self.K if self.U else 0


@dataclass(frozen=True)
class Work:
    kernel: str
    bytes: int
    # products of tiles, on tensor cores
    tensor_flop: int
    # the images' element-wise work, on the CUDA cores
    flop: int
    exponentials: int
    launches: int = 1

    @property
    def least_s(self) -> float:
        """The time of the busiest unit."""
        return max(self.seconds.values())

    @property
    def seconds(self) -> dict[str, float]:
        return {
            "memory": self.bytes / BYTES_PER_S,
            "tensor cores": self.tensor_flop / BF16_FLOP_PER_S,
            "float32 units": self.flop / FLOAT32_FLOP_PER_S,
            "exp2": self.exponentials / EXP_PER_S,
        }


def forward(s: Shape) -> Work:
    return Work(
        "forward",
        # q, out, k, v, image_k, image_v, index, lse
        2 * s.query_bytes + 2 * s.key_bytes + 2 * s.image_bytes + s.index_bytes + s.row_bytes,
        # q k and p v
        4 * s.D * s.pairs,
        # score, and a weighted sum that is rescaled each time
        5 * s.D * s.image_pairs,
        s.pairs + 2 * s.image_pairs,
    )


def whole_backward(s: Shape) -> Work:
    """All gradients in one pass, which no kernel does: each product once."""
    return Work(
        "backward",
        # q, out, grad_out, dq, k, v, dk, dv, images and their gradients, index, lse
        4 * s.query_bytes + 4 * s.key_bytes + 4 * s.image_bytes + s.index_bytes + s.row_bytes,
        # q k, do v, ds k, ds q, p do
        10 * s.D * s.pairs,
        # q image_k, do image_v, dt image_k, dt q, b do
        8 * s.D * s.image_pairs,
        s.pairs + s.image_pairs,
    )


def query(s: Shape) -> Work:
    return Work(
        "backward: queries",
        # q, out, grad_out, dq, k, v, image_k, image_v, index, lse, grad_lse, delta
        4 * s.query_bytes + 2 * s.key_bytes + 2 * s.image_bytes + s.index_bytes + 3 * s.row_bytes + s.image_grad_bytes,
        # q k, do v, ds k
        6 * s.D * s.pairs,
        # q image_k, do image_v, dt image_k; dense: dt q and b do too
        (6 if s.U else 8) * s.D * s.image_pairs,
        s.pairs + s.image_pairs,
    )


def key(s: Shape) -> Work:
    return Work(
        "backward: keys",
        # q, grad_out, k, v, dk, dv, lse, delta
        2 * s.query_bytes + 4 * s.key_bytes + 2 * s.row_bytes,
        # q k, do v, p do, ds q
        8 * s.D * s.pairs,
        0,
        s.pairs,
    )


def pool(s: Shape) -> Work:
    return Work(
        "backward: pool",
        # q, grad_out, two coefficients per slot and head, the sorted order, two gradients. Rows of q and grad_out are
        # gathered once per slot that uses them; at these sizes both tensors stay in the 50 MB of L2.
        2 * s.query_bytes + 8 * s.image_pairs + s.index_bytes + 2 * s.image_bytes,
        0,
        4 * s.D * s.image_pairs,
        0,
    )


def sort(s: Shape) -> Work:
    """The slots of the pool by image, once for a backward."""
    slots = s.B * s.Tq * s.K
    key_bytes = 2 if s.U < 1 << 15 else 4  # and as many passes
    # each pass reads and writes a key and an index of 8 bytes; then the segments, 8 bytes an image
    moved = 2 * (key_bytes + 8) * key_bytes * slots + 8 * s.U
    return Work("backward: sort of the slots", moved, 0, 0, 0, SORT_LAUNCHES + key_bytes)


def merge(s: Shape) -> Work:
    """The parts of a decoding query whose keys are split over the chip; they have too few bytes to count."""
    return Work("forward: merge of the splits", 0, 0, 0, 0)


def text(s: Shape, backward: bool) -> Work:
    """Flash attention to only the text, forward or backward, by PyTorch."""
    only_text = replace(s, K=0, U=0)
    return replace((whole_backward if backward else forward)(only_text), kernel="flash attention")


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if not any(returned.alias_info for returned in function._schema.returns):
            self.operations += 1
            self.bytes += sum(x.nbytes for x in tree_leaves((arguments, options, result)) if isinstance(x, Tensor))
        return result


def images_in_pytorch(s: Shape, backward: bool) -> Work:
    """What the peer "flash + LSE merge" does for the images, forward or backward, with a pool as dense images."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return empty(s.B, s.Tq, s.H, *shape, dtype=dtype).transpose(1, 2)

    q, out, grad_out, grad_q = (tokens(s.D) for _ in range(4))
    images = empty(s.B, s.Tq, s.K, s.H // s.G, s.D)
    pool, index = empty(s.U, s.H // s.G, s.D), empty(s.B, s.Tq, s.K, dtype=torch.int64)
    image_k, image_v = (images.permute(0, 3, 1, 2, 4) for _ in range(2))
    with Traffic() as traffic:
        if backward:
            attention.image_gradients(grad_out, q, image_k, image_v, tokens(s.K), out, grad_q)
        else:
            attention.join_images(q, image_k, image_v, out, tokens(dtype=torch.float32))
        for _ in range(2 if s.U else 0):
            pool.index_put((index,), images, accumulate=True) if backward else pool[index]
    return Work("images", traffic.bytes, 0, 0, 0, traffic.operations)


def forward_works(s: Shape) -> list[Work]:
    return [forward(s)] + ([merge(s)] if s.Tq == 1 else [])


def backward_works(s: Shape) -> list[Work]:
    works = [query(s), key(s)]
    if s.U:  # a separate kernel sums the parts of a popular image
        works += [sort(s), replace(pool(s), launches=2)]
    return works


def gpu_s(works: list[Work]) -> float:
    """The time of kernels that run one after the other."""
    return sum(work.least_s + LAUNCH_S * work.launches for work in works)


def host_s(s: Shape, backward: bool) -> float:
    """The host's time for the forward without gradients, or for the backward."""
    if backward:
        return POOLED_BACKWARD_HOST_S if s.U else BACKWARD_HOST_S
    return DECODING_HOST_S if s.Tq == 1 else FORWARD_HOST_S


def attention_s(s: Shape, backward: bool) -> float:
    """The floor of the forward, or of forward and backward."""
    return forward(s).least_s + (whole_backward(s).least_s if backward else 0)


def topk_s(queries: int, rows: int, dim: int) -> float:
    """The floor of a search among 16-bit rows with their norms."""
    return max(rows * (2 * dim + 4) / BYTES_PER_S, 2 * queries * rows * dim / BF16_FLOP_PER_S)


def queries_of_block(queries: int) -> int:
    """The queries that share a read of the rows (csrc/topk/cuda/plan.hpp, float16 rows on an H100)."""
    return next(block for block in (16, 32, 64, 128) if queries <= block or block == 128)


def search_s(queries: int, rows: int, dim: int) -> float:
    """Our search: each block of queries reads the rows from the second-level cache."""
    block = queries_of_block(queries)
    blocks = -(-queries // block)
    products = 2 * blocks * block * rows * dim / (MMA_SYNC_SHARE * BF16_FLOP_PER_S)
    read = blocks * rows * (2 * dim + 4) / CACHE_BYTES_PER_S
    return max(topk_s(queries, rows, dim), read, products) + SEARCH_LAUNCHES * LAUNCH_S


def matmul_topk_s(queries: int, rows: int, dim: int) -> float:
    """PyTorch's product and `topk`, which writes and reads 16-bit scores at least once."""
    return topk_s(queries, rows, dim) + 4 * queries * rows / BYTES_PER_S + 2 * LAUNCH_S


def transformer_s(parameters: int, tokens: int, passes: int) -> float:
    """The least time of `tokens` through the weights of a model in 16 bits: 1 pass is a forward, 3 a training step."""
    return passes * max(2 * parameters * tokens / BF16_FLOP_PER_S, 2 * parameters / BYTES_PER_S)


SHAPES = (
    Shape("B4 H12 T1024 K8 D64, dense", 4, 12, 1024, 1024, 8, 64),
    Shape("B4 H12 T1024 K8 D64, pooled", 4, 12, 1024, 1024, 8, 64, U=int(0.3 * 4 * 1024 * 8)),
    Shape("B4 H16 T4096 K8 D64, dense", 4, 16, 4096, 4096, 8, 64),
    Shape("B4 H16 T4096 K8 D64, pooled", 4, 16, 4096, 4096, 8, 64, U=int(0.3 * 4 * 4096 * 8)),
    Shape("B1 Hq32 Hkv8 T4096 K8 D128, dense", 1, 32, 4096, 4096, 8, 128, G=4),
    Shape("B1 H12 Tq1 Tk8192 K8 D64, dense (decoding)", 1, 12, 1, 8192, 8, 64),
)
TOPK_QUERIES = (1, 64, 512, 1024, 4096)
TOPK_ROWS, TOPK_DIM = 1_000_000, 768
SEARCH_LAUNCHES = 5  # kernels of a search (csrc/topk/cuda/launch.cuh)


def table() -> str:
    """The arithmetic of docs/results/gpu.md: a row for each call."""
    lines = [
        "| Call in 16 bits | Direction | Floor, µs | Floor bound by | Ours on paper, µs | In PyTorch, µs "
        "| Our host, µs |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]

    def add(name: str, direction: str, floor: float, bound: str, *others: float | None) -> None:
        times = (floor, *others)
        least, *rest = ("–" if seconds is None else f"{1e6 * seconds:,.0f}" for seconds in times)
        lines.append(f"| {' | '.join((name, direction, least, bound, *rest))} |")

    for shape in SHAPES:
        for backward in (False, True)[: 1 + (shape.Tq > 1)]:
            floor = (whole_backward if backward else forward)(shape)
            bound = max(floor.seconds, key=floor.seconds.__getitem__)
            ours = gpu_s((backward_works if backward else forward_works)(shape))
            pytorch = gpu_s([text(shape, backward), images_in_pytorch(shape, backward)])
            others = (ours, pytorch, host_s(shape, backward))
            add(shape.name, "backward" if backward else "forward", floor.least_s, bound, *others)
    for queries in TOPK_QUERIES:
        size = (queries, TOPK_ROWS, TOPK_DIM)
        floor = topk_s(*size)
        bound = "memory" if floor == topk_s(0, *size[1:]) else "tensor cores"
        name = f"exact top-8, {TOPK_ROWS:,} rows of {TOPK_DIM}, queries: {queries:,}"
        add(name, "search", floor, bound, search_s(*size), matmul_topk_s(*size), None)
    return "\n".join(lines)
