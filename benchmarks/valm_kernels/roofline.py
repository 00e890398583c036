"""What an H100 must move and compute for each Triton kernel of visual_fusion_attn, and the time that allows.

Arithmetic, not measurement: every tensor crosses the memory bus once, tiles waste nothing, nothing waits for anything
else than the busiest unit. No kernel can be faster; how near ours come, only a card can tell.

    python -m benchmarks.valm_kernels.roofline        # prints the tables of docs/roofline.md
"""

from __future__ import annotations

from dataclasses import dataclass

# NVIDIA H100 SXM5 80 GB (data sheet; without sparsity). Special functions: 16 exp2 per clock and multiprocessor
# (CUDA C++ Programming Guide, arithmetic throughput), 132 multiprocessors, 1.83 GHz.
BYTES_PER_S = 3.35e12
BF16_FLOP_PER_S = 989e12
FLOAT32_FLOP_PER_S = 67e12
EXP_PER_S = 16 * 132 * 1.83e9


@dataclass(frozen=True)
class Shape:
    """Sizes as in visual_fusion_attn; U images in the pool, 0 in the dense layout. 16-bit tensors."""

    name: str
    B: int
    H: int
    Tq: int
    Tk: int
    K: int
    D: int
    U: int = 0

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
        return 2 * self.B * self.H * self.Tk * self.D

    @property
    def row_bytes(self) -> int:
        """lse, or delta: one float32 per query and head."""
        return 4 * self.B * self.H * self.Tq

    @property
    def image_bytes(self) -> int:
        """image_k, or image_v."""
        return 2 * self.D * (self.H * self.U or self.image_pairs)

    @property
    def index_bytes(self) -> int:
        return 8 * self.B * self.Tq * self.K if self.U else 0


@dataclass(frozen=True)
class Work:
    kernel: str
    bytes: int
    # products of tiles, on tensor cores
    tensor_flop: int
    # the images' element-wise work, on the ordinary units
    flop: int
    exponentials: int

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


SHAPES = (
    Shape("B4 H12 T1024 K8 D64, dense", 4, 12, 1024, 1024, 8, 64),
    Shape("B4 H12 T1024 K8 D64, pooled, 30 % unique", 4, 12, 1024, 1024, 8, 64, U=int(0.3 * 4 * 1024 * 8)),
    Shape("B4 H12 T2048 K8 D64, pooled, 30 % unique", 4, 12, 2048, 2048, 8, 64, U=int(0.3 * 4 * 2048 * 8)),
    Shape("B4 H16 T4096 K8 D128, pooled, 30 % unique", 4, 16, 4096, 4096, 8, 128, U=int(0.3 * 4 * 4096 * 8)),
    Shape("B1 H12 Tq1 Tk4096 K4 D64, dense (decoding)", 1, 12, 1, 4096, 4, 64),
)


def tables() -> str:
    lines = []
    for shape in SHAPES:
        lines += [
            f"### {shape.name}, 16-bit",
            "",
            "| kernel | MB | tensor GFLOP | float32 GFLOP | exp2, millions | least time, µs | bound by | measured |",
            "|---|---|---|---|---|---|---|---|",
        ]
        works = [forward(shape)]
        if shape.Tq > 1:
            works += [query(shape), key(shape)] + ([pool(shape)] if shape.U else [])
        for work in works:
            bound = max(work.seconds, key=work.seconds.__getitem__)
            lines.append(
                f"| {work.kernel} | {work.bytes / 1e6:.1f} | {work.tensor_flop / 1e9:.2f} | {work.flop / 1e9:.2f} "
                f"| {work.exponentials / 1e6:.1f} | {work.seconds[bound] * 1e6:.1f} | {bound} | not yet |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
