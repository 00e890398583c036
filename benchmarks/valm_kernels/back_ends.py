"""The table of docs/templates/valm_kernels.md: the back end that impl="auto" chooses on CUDA, asked of the package."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from valm_kernels.visual_fusion import crossover, flash
from valm_kernels.visual_fusion.checks import checked_inputs

CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)
LENGTHS = range(2, 2**16 + 1)


@dataclass(frozen=True)
class Call:
    name: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    images: bool = True
    one_query: bool = False
    first_key: bool = False
    active: str | None = None  # the flash attention that replaces PyTorch's own

    def is_joined(self, keys: int, capability: int) -> bool:
        """Whether "flash+triton" is chosen for so many keys, and as many queries or one."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        queries = 1 if self.one_query else keys
        given: dict[str, Any] = {"q": empty(1, 1, queries, self.head_dim), "k": empty(1, 1, keys, self.head_dim)}
        given["image_k"] = given["image_v"] = empty(1, 1, queries, 1, self.head_dim) if self.images else None
        given["first_key"] = empty(1, queries, dtype=torch.int32) if self.first_key else None
        with (
            mock.patch.object(crossover, "capability", lambda device: capability),
            mock.patch.object(flash, "active_implementation", lambda: self.active),
        ):
            return flash.is_faster(checked_inputs(v=given["k"], **given))

    def back_end(self, capability: int) -> str:
        shortest = bisect_left(LENGTHS, True, key=lambda keys: self.is_joined(keys, capability))
        if shortest == len(LENGTHS):
            return '`"triton"`'
        if shortest == 0:
            return '`"flash+triton"`'
        return f'`"triton"`; Tk ≥ {LENGTHS[shortest]:,}: `"flash+triton"`'


CALLS = (
    Call("float32", torch.float32),
    Call("16 bits, one query", one_query=True),
    Call("16 bits, `first_key`, `cache_seqlens` or `softcap`", first_key=True),
    Call("16 bits, no images", images=False),
    *(
        Call(f"16 bits, D {head_dim}, FlashAttention-{active[2:]} activated", head_dim=head_dim, active=active)
        for active in ("FA3", "FA4")
        for head_dim in (64, 128)
    ),
    *(Call(f"16 bits, D {head_dim}", head_dim=head_dim) for head_dim in (64, 128, 256)),
)


def table() -> str:
    """A column for the compute capabilities that get equal answers, and a row for the calls that do."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for capability in CAPABILITIES:
        answers = tuple(call.back_end(capability) for call in CALLS)
        columns.setdefault(answers, []).append(f"{capability // 10}.{capability % 10}")
    rows: dict[tuple[str, ...], list[str]] = {}
    for call, *answers_of_call in zip(CALLS, *columns, strict=True):
        rows.setdefault(tuple(answers_of_call), []).append(call.name)
    head: list[Sequence[str]] = [("Call on CUDA", *map(", ".join, columns.values())), ["---"] * (1 + len(columns))]
    cells = [*head, *(("; ".join(names), *answers) for answers, names in rows.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
