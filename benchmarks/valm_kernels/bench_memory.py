"""A memory of the text (Memorizing Transformers): each head searches its past keys and attends to the keys found.

The peers are PyTorch's products with topk, and einsum over gathered keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.sizes import sized
from tests.valm_kernels.topk.databases import normals
from valm_kernels import FlatIPIndex, ip_topk, visual_fusion_attn

HEADS, TOKENS, DIM, ENTRIES = sized((12, 512, 64, 32), (2, 16, 16, 4))
ROWS, MANY_ROWS = sized((8192, 65_536), (32, 64))


class Memory(NamedTuple):
    """One segment (1, H, T, D), a memory of `rows` keys per head (H, N, D), and the best rows (1, H, T, K)."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    index: Tensor


@cache
def memory(rows: int, device: torch.device) -> Memory:
    q, k, v = (normals(HEADS * TOKENS, DIM, seed=n).view(1, HEADS, TOKENS, DIM).to(device) for n in range(3))
    keys, values = (normals(HEADS * rows, DIM, seed=n).view(HEADS, rows, DIM).to(device) for n in (3, 4))
    return Memory(q, k, v, keys, values, torch_topk(q[0], keys)[None])


def torch_topk(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.transpose(1, 2)).topk(ENTRIES).indices


def all_heads_topk(queries: Tensor, keys: Tensor) -> Tensor:
    return ip_topk(queries, keys, ENTRIES).indices


def index_topk(keys: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    indexes = [FlatIPIndex(of_head) for of_head in keys]
    return lambda queries, _: torch.stack(
        [index.search(some, ENTRIES).indices for index, some in zip(indexes, queries, strict=True)]
    )


@pytest.mark.parametrize("rows", [ROWS, pytest.param(MANY_ROWS, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["ip_topk, all heads", "a FlatIPIndex for each head", "torch mm + topk"])
def bench_search(measure, device, name, rows):
    """Compares the keys found, because float32 products may order near ties differently."""
    given = memory(rows, device)
    functions = {"ip_topk, all heads": all_heads_topk, "torch mm + topk": torch_topk}
    search = functions[name] if name in functions else index_topk(given.keys)

    def check(indices: Tensor) -> None:
        assert (indices.sort().values == given.index[0].sort().values).float().mean() > 0.999

    measure(
        group=f"{ENTRIES} of {rows} keys of each of {HEADS} heads, T {TOKENS} D {DIM} float32",
        name=name,
        function=search,
        inputs=(given.q[0], given.keys),
        check=check,
    )


def einsum_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """The usual way: gathers keys and values, concatenates all scores and takes one softmax."""
    heads, tokens = torch.arange(HEADS, device=q.device)[:, None, None], q.shape[2]
    found_k, found_v = (pool[heads, index[0]][None] for pool in (keys, values))  # (1, H, T, K, D)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(future, -torch.inf)
    scores = torch.cat([scores, torch.einsum("bhid,bhikd->bhik", q, found_k)], -1) * DIM**-0.5
    weights = scores.softmax(-1)
    of_text = torch.einsum("bhij,bhjd->bhid", weights[..., :tokens], v)
    return of_text + torch.einsum("bhik,bhikd->bhid", weights[..., tokens:], found_v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return visual_fusion_attn(q, k, v, keys, values, image_index=index)


@pytest.mark.parametrize("function", [fused_attention, einsum_attention], ids=["ours", "einsum"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
def bench_attention(measure, device, backward, function):
    """The memory is not trained: only the segment has gradients."""
    q, k, v, *rest = memory(ROWS, device)
    leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]

    def call(*text: Tensor) -> tuple[Tensor, ...]:
        out = function(*text, *rest)
        return torch.autograd.grad(out.sum(), text) if backward else (out,)

    wide = [x.detach().double().requires_grad_(backward) for x in (q, k, v)]
    out = einsum_attention(*wide, *(x.double() for x in rest[:2]), rest[2])
    expected = torch.autograd.grad(out.sum(), wide) if backward else (out,)

    def check(results: tuple[Tensor, ...]) -> None:
        bound = 1e-4 if backward else 1e-5
        assert all((found - true).abs().max() < bound for found, true in zip(results, expected, strict=True))

    direction = "forward + backward" if backward else "forward"
    measure(
        group=f"a memory of {ROWS}, {direction} H {HEADS} T {TOKENS} K {ENTRIES} D {DIM}",
        name="ours" if function is fused_attention else "einsum",
        function=call,
        inputs=tuple(leaves),
        check=check,
    )
