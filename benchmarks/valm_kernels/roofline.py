"""A lower bound of the time of our GPU kernels on an H100: bytes moved, operations, and launches.

Arithmetic, not measurement: every tensor crosses the memory bus once, tiles waste nothing, and a kernel waits only for
its busiest unit. No kernel can be faster; only a GPU can tell how near ours come. `python -m benchmarks.report` writes
the last table of docs/results/gpu.md from it, and benchmarks on a GPU print it next to their measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# NVIDIA H100 SXM5 80 GB (data sheet; without sparsity). Special functions: 16 exp2 per clock and multiprocessor
# (CUDA C++ Programming Guide, arithmetic throughput), 132 multiprocessors, 1.83 GHz.
BYTES_PER_S = 3.35e12
BF16_FLOP_PER_S = 989e12
FLOAT32_FLOP_PER_S = 67e12
EXP_PER_S = 16 * 132 * 1.83e9

# Not in a data sheet, and to be measured on a GPU: the time from the end of one kernel to the start of the next on its
# stream, and the time of the host. The host's time is Triton's binder for each launch, plus the least times of
# host_time.py on two busy cores of an AMD EPYC: a forward without gradients, a dense backward, and the addition to the
# backward by a pool and the sort of its slots.
LAUNCH_S = 3e-6
BINDER_S = 13e-6
FORWARD_HOST_S = 52e-6
BACKWARD_HOST_S = 119e-6
POOL_HOST_S = 31e-6
SORT_HOST_S = 40e-6
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
    # PyTorch's kernels need no binder
    by_triton: bool = True

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


def query(s: Shape) -> Work:
    # dense: image gradients are written here; pooled: two float32 coefficients per slot and head
    image_output = 8 * s.image_pairs if s.U else 2 * s.image_bytes
    return Work(
        "backward: queries",
        # q, out, grad_out, dq, k, v, image_k, image_v, index, lse, grad_lse, delta
        4 * s.query_bytes + 2 * s.key_bytes + 2 * s.image_bytes + s.index_bytes + 3 * s.row_bytes + image_output,
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
    return Work("backward: sort of the slots", moved, 0, 0, 0, SORT_LAUNCHES + key_bytes, by_triton=False)


def merge(s: Shape) -> Work:
    """The parts of a decoding query whose keys are split over the chip; they have too few bytes to count."""
    return Work("forward: merge of the splits", 0, 0, 0, 0)


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
    works = backward_works(s) if backward else forward_works(s)
    bound = BINDER_S * sum(work.launches for work in works if work.by_triton)
    if not backward:
        return FORWARD_HOST_S + bound
    return BACKWARD_HOST_S + (POOL_HOST_S + SORT_HOST_S if s.U else 0) + bound


def attention_s(s: Shape, backward: bool) -> float:
    """The least time of the forward, or of forward and backward."""
    return sum(work.least_s for work in forward_works(s) + (backward_works(s) if backward else []))


def topk_s(queries: int, rows: int, dim: int) -> float:
    """The least time of a search among 16-bit rows with their norms."""
    return max(rows * (2 * dim + 4) / BYTES_PER_S, 2 * queries * rows * dim / BF16_FLOP_PER_S)


def transformer_s(parameters: int, tokens: int, passes: int) -> float:
    """The least time of `tokens` through the weights of a model in 16 bits: 1 pass is a forward, 3 a training step."""
    return passes * max(2 * parameters * tokens / BF16_FLOP_PER_S, 2 * parameters / BYTES_PER_S)


SHAPES = (
    Shape("B4 H12 T1024 K8 D64, dense", 4, 12, 1024, 1024, 8, 64),
    Shape("B4 H12 T1024 K8 D64, pooled, 30 % unique", 4, 12, 1024, 1024, 8, 64, U=int(0.3 * 4 * 1024 * 8)),
    Shape("B8 H32/8 T4096 K4 D128, dense", 8, 32, 4096, 4096, 4, 128, G=4),
    Shape("B4 H12 T2048 K8 D64, pooled, 30 % unique", 4, 12, 2048, 2048, 8, 64, U=int(0.3 * 4 * 2048 * 8)),
    Shape("B4 H16 T4096 K8 D128, pooled, 30 % unique", 4, 16, 4096, 4096, 8, 128, U=int(0.3 * 4 * 4096 * 8)),
    Shape("B1 H12 Tq1 Tk8192 K8 D64, dense (decoding)", 1, 12, 1, 8192, 8, 64),
)
TOPK_QUERIES = (64, 512, 4096)
TOPK_ROWS, TOPK_DIM = 1_000_000, 768


def table() -> str:
    """The estimates of docs/results/gpu.md: a row for each call."""
    lines = [
        "| Call in 16 bits | Direction | Memory traffic, MB | Kernels, µs | Bound by | With launches and host, µs |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for shape in SHAPES:
        directions = {"forward": forward_works(shape)} | ({"backward": backward_works(shape)} if shape.Tq > 1 else {})
        for direction, works in directions.items():
            longest = max(works, key=lambda work: work.least_s)
            bound = max(longest.seconds, key=longest.seconds.__getitem__)
            call = max(gpu_s(works), host_s(shape, direction == "backward"))
            moved, least = sum(work.bytes for work in works), sum(work.least_s for work in works)
            cells = [shape.name, direction, f"{moved / 1e6:,.0f}", f"{least * 1e6:,.1f}", bound, f"{call * 1e6:,.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for queries in TOPK_QUERIES:
        least, memory = (topk_s(count, TOPK_ROWS, TOPK_DIM) for count in (queries, 0))
        bound = "memory" if least == memory else "tensor cores"
        name = f"exact top-K, {queries:,} queries, {TOPK_ROWS:,} rows of {TOPK_DIM}"
        moved = memory * BYTES_PER_S
        lines.append(f"| {name} | search | {moved / 1e6:,.0f} | {least * 1e6:,.1f} | {bound} | – |")
    return "\n".join(lines)
