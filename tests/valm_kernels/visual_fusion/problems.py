"""Random inputs of visual_fusion_attn, and comparisons of an implementation with the reference."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.tolerance import assert_accurate
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion.inputs import Gradients

DIFFERENTIABLE = Gradients._fields
# Gradients whose error in 16 bits may be four times eager's; tests/README.md explains why.
ROUNDED = ("image_k_bias", "image_logit_bias")


@dataclass(frozen=True)
class Problem:
    """A shape and a layout; `inputs` fills it with seeded random numbers.

    The image values and the cotangent of out have mean 1, so that the loss favours images. The gradients of the biases
    are sums over all tokens; with random signs, such sums would mostly compare rounding errors.
    """

    batch: int = 2
    query_heads: int = 4
    kv_heads: int = 2
    num_queries: int = 40
    prefix: int = 0  # Tk - Tq
    head_dim: int = 16
    num_images: int = 3
    pool_size: int | None = None  # None: dense layout
    by_head: bool = False  # each key head has its own images
    first_key: str | None = None  # a name of FIRST_KEYS
    cu_seqlens: bool = False  # documents, an empty one among them
    seqlens: bool = False  # cache_seqlens: different in each row, and below the number of queries in the last
    causal: bool = True
    scale: float | None = None
    softcap: float | None = None
    image_q: bool = False
    biases: bool = True
    score_bias: bool = False  # NaN at slots without an image
    weights: bool = False  # the loss also depends on the weights of the images
    gaps: bool = True  # some slots contain no image
    tokens_first: bool = True  # memory order (B, T, H, D), as after a projection
    seed: int = 0

    @property
    def num_keys(self) -> int:
        return self.num_queries + self.prefix

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | bool | None]:
        """Keyword arguments, equal for every dtype: 16-bit values that are exact in each."""
        generator = torch.Generator().manual_seed(self.seed)
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int, mean: float = 0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator) + mean).bfloat16().half().to(dtype)

        def tokens(heads: int, length: int) -> Tensor:
            if self.tokens_first:
                return normal(self.batch, length, heads, self.head_dim).transpose(1, 2)
            return normal(self.batch, heads, length, self.head_dim)

        inputs: dict[str, Tensor | bool | None] = {
            "q": tokens(self.query_heads, self.num_queries),
            "k": tokens(self.kv_heads, self.num_keys),
            "v": tokens(self.kv_heads, self.num_keys),
            "image_k": None,
            "image_v": None,
            "causal": self.causal,
        }
        if self.scale is not None:
            inputs["scale"] = self.scale
        if self.softcap is not None:
            inputs["softcap"] = self.softcap
        slots = (self.batch, self.num_queries, self.num_images)
        if self.num_images and self.pool_size is None:
            shape = (self.batch, self.num_queries, self.num_images, self.kv_heads, self.head_dim)
            for name, mean in (("image_k", 0), ("image_v", 1)):
                inputs[name] = normal(*shape, mean=mean).permute(0, 3, 1, 2, 4)
            if self.gaps:
                inputs["image_mask"] = torch.rand(slots, generator=generator) < 0.7
        elif self.pool_size is not None:
            for name, mean in (("image_k", 0), ("image_v", 1)):
                inputs[name] = normal(self.pool_size, self.kv_heads, self.head_dim, mean=mean).transpose(0, 1)
            lowest = -1 if self.gaps else 0
            of_index = (self.batch, self.kv_heads, *slots[1:]) if self.by_head else slots
            inputs["image_index"] = torch.randint(lowest, self.pool_size, of_index, generator=generator)
        if self.biases:
            inputs["image_k_bias"] = normal(self.kv_heads, self.head_dim, dtype=wide)
            inputs["image_v_bias"] = normal(self.kv_heads, self.head_dim, dtype=wide)
            inputs["image_logit_bias"] = normal(self.query_heads, dtype=wide)
        if self.first_key:
            inputs["first_key"] = FIRST_KEYS[self.first_key](self, generator)
        if self.cu_seqlens:
            bounds = torch.tensor([0, 2, 3, 3, 7, 30, 55, self.num_keys]).clamp(max=self.num_keys)
            mirrored = self.num_keys - bounds.flip(0)
            rows = [(mirrored if row % 2 else bounds) + row * self.num_keys for row in range(self.batch)]
            inputs["cu_seqlens"] = torch.cat(rows).int()
        if self.image_q:
            inputs["image_q"] = tokens(self.query_heads, self.num_queries)
        if self.seqlens:
            lengths = torch.randint(self.num_queries, self.num_keys + 1, (self.batch,), generator=generator).int()
            lengths[-1] = self.num_queries // 2
            inputs["cache_seqlens"] = lengths
        if self.score_bias:
            bias = normal(*slots, dtype=wide)
            if "image_mask" in inputs:
                bias[~inputs["image_mask"]] = torch.nan
            elif "image_index" in inputs:
                absent = inputs["image_index"] < 0
                bias[absent.all(1) if self.by_head else absent] = torch.nan
            inputs["image_score_bias"] = bias
        return inputs


def _documents(problem: Problem, generator: torch.Generator) -> Tensor:
    """Documents of uneven length, different in each batch row; the first document sees the prefix."""
    position = torch.arange(problem.num_queries)
    rows = []
    for row in range(problem.batch):
        starts = torch.tensor([0, 7 + row, 19, 20, 75 - row, 133])
        start = starts[(position[:, None] >= starts).sum(-1) - 1]
        rows.append(torch.where(start == 0, 0, start + problem.prefix))
    return torch.stack(rows).int()


def _left_padding(problem: Problem, generator: torch.Generator) -> Tensor:
    pads = torch.randint(0, problem.num_keys, (problem.batch, 1), generator=generator)
    return pads.expand(-1, problem.num_queries).int().contiguous()


def _sliding_window(problem: Problem, generator: torch.Generator) -> Tensor:
    window = torch.arange(problem.num_queries) + problem.prefix - 5
    return window.expand(problem.batch, -1).int()


def _random(problem: Problem, generator: torch.Generator) -> Tensor:
    """Not monotone, and for many queries beyond the last visible key: these queries see no text."""
    return torch.randint(-3, problem.num_keys + 2, (problem.batch, problem.num_queries), generator=generator).int()


def _descending(problem: Problem, generator: torch.Generator) -> Tensor:
    """Every query sees one more key at both ends than the query before."""
    first = problem.num_keys - 1 - torch.arange(problem.num_queries)
    return first.expand(problem.batch, -1).int()


def _alternating(problem: Problem, generator: torch.Generator) -> Tensor:
    """Every second query sees all text, the others none; in the second batch row the other way round."""
    sees = (torch.arange(problem.num_queries) + torch.arange(problem.batch)[:, None]) % 2 == 0
    return torch.where(sees, 0, problem.num_keys).int()


def _extreme(problem: Problem, generator: torch.Generator) -> Tensor:
    """The largest and the smallest numbers: all text, none, and in the last batch row none for every query."""
    int32 = torch.iinfo(torch.int32)
    first = torch.full((problem.batch, problem.num_queries), int32.max)
    first[:-1, ::3] = int32.min
    first[:-1, 1::3] = 2
    return first.int()


def _striped(problem: Problem, generator: torch.Generator) -> Tensor:
    """Runs of 16 queries that see all text alternate with runs that see only their own key. So a key tile can skip
    whole tiles in the middle of its queries."""
    position = torch.arange(problem.num_queries)
    first = torch.where(position // 16 % 2 == 0, 0, position + problem.prefix)
    return first.expand(problem.batch, -1).int()


FIRST_KEYS = {
    "documents": _documents,
    "left_padding": _left_padding,
    "sliding_window": _sliding_window,
    "random": _random,
    "descending": _descending,
    "alternating": _alternating,
    "extreme": _extreme,
    "striped": _striped,
}


def differentiable(inputs: dict[str, Tensor | bool | None]) -> dict[str, Tensor]:
    """The tensors with a gradient."""
    names = DIFFERENTIABLE if inputs["image_k"] is not None else ("q", "k", "v")
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def solve(
    inputs: dict[str, Tensor | bool | None], impl: str, cotangents: tuple[Tensor | None, ...]
) -> dict[str, Tensor]:
    """out, lse and the gradient of every input by `impl`. Cotangents: of out, of lse (None: lse unused) and, if the
    image weights are returned, of the weights."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in differentiable(inputs).items()}
    names = ("out", "lse", "image_weights")[: len(cotangents)]
    results = visual_fusion_attn(
        **{**inputs, **leaves}, impl=impl, return_lse=True, return_image_weights="image_weights" in names
    )
    detached = {name: result.detach() for name, result in zip(names, results, strict=True)}
    return detached | gradients_of(results, cotangents, leaves)


def gradients_of(
    results: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients by name of the leaf; a result without cotangent is unused."""
    pairs = [(r, c.to(r)) for r, c in zip(results, cotangents, strict=True) if c is not None]
    outputs, grad_outputs = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs)
    return dict(zip(leaves, gradients, strict=True))


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares the results; `expected` may contain more names."""
    for name, tensor in found.items():
        assert tensor.equal(expected[name]), name


def cotangents(problem: Problem, with_lse: bool = True) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(problem.seed + 1)
    shape = (problem.batch, problem.query_heads, problem.num_queries)
    grad_out = (torch.randn((*shape, problem.head_dim), generator=generator) + 1).bfloat16().half().double()
    grad_lse = torch.randn(shape, generator=generator).double()  # float32, whatever the dtype of q
    of_weights = [torch.randn((*shape, problem.num_images), generator=generator).double()] if problem.weights else []
    return grad_out, grad_lse if with_lse else None, *of_weights


def assert_solves(impl: str, problem: Problem, dtype: torch.dtype, with_lse: bool = True, device: str = "cpu") -> None:
    """Compares `impl` on `device` in `dtype`, forward and backward, with float64 on the CPU."""
    grads = cotangents(problem, with_lse)
    truth = solve(problem.inputs(torch.float64), "reference", grads)
    eager = solve(problem.inputs(dtype), "reference", grads)
    inputs = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in problem.inputs(dtype).items()}
    actual = {name: tensor.cpu() for name, tensor in solve(inputs, impl, grads).items()}
    assert actual.keys() == truth.keys()
    # A backward begins from lse: where that is 8, a weight exp(score - lse) in float32 is off by up to four units. It
    # shows in Triton's kernels, which have scores in units of log 2 and round lse once more.
    of_lse = max(1.0, float(truth["lse"][truth["lse"].isfinite()].abs().max()) / 2)
    # They add keys or queries one after the other, PyTorch on a CPU in blocks: n roundings within half a unit each.
    terms = max(problem.num_keys, problem.num_queries * problem.query_heads // problem.kv_heads)
    of_sums = max(1.0, math.sqrt(terms / 12))
    for name, tensor in actual.items():
        units = 1.0
        if impl == "triton" and dtype == torch.float32 and name in ("out", *DIFFERENTIABLE):
            units = max(of_sums, of_lse) if name in DIFFERENTIABLE else of_sums
        assert_result_accurate(name, tensor, eager[name], truth[name], dtype, units)


def assert_result_accurate(
    name: str, actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, units: float = 1
) -> None:
    """`assert_accurate`; compares the logarithms of weights, because scores are what is rounded."""
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, expected {eager.dtype}"
    if name == "image_weights":
        actual, eager, truth = actual.log(), eager.log(), truth.log()
    precision = actual.dtype if name in ("lse", "image_weights") else dtype
    times = 4 if name in ROUNDED and dtype.itemsize == 2 else 2
    assert_accurate(name, actual, eager, truth, precision, times, units)


def assert_passes_nan_on(impl: str, name: str, dtype: torch.dtype) -> None:
    """Checks that a NaN in `name` appears in the results of exactly the queries that depend on it."""
    inputs = Problem(batch=1, num_queries=6, num_images=3, head_dim=8).inputs(dtype)
    inputs["image_mask"][:] = True
    inputs[name][0, 1, 4, ..., 2] = torch.nan
    found, expected = (visual_fusion_attn(**inputs, return_lse=True, impl=i) for i in (impl, "reference"))
    assert expected[0].isnan().any() and (expected[1].isnan().any() or name == "image_v")
    for found_part, expected_part in zip(found, expected, strict=True):
        assert found_part.isnan().equal(expected_part.isnan())


def assert_minus_infinity_is_weight_zero(impl: str, problem: Problem) -> None:
    """Checks that an image whose image_score_bias is -inf counts as absent."""
    inputs = replace(problem, score_bias=True).inputs(torch.float32)
    excluded = torch.rand(inputs["image_score_bias"].shape, generator=torch.Generator().manual_seed(3)) < 0.4
    excluded[:, -1] = True
    by_bias = {**inputs, "image_score_bias": inputs["image_score_bias"].masked_fill(excluded, -torch.inf)}
    absent = {**inputs}
    if problem.pool_size is None:
        absent["image_mask"] = inputs["image_mask"] & ~excluded
    else:
        of_heads = excluded[:, None] if problem.by_head else excluded
        absent["image_index"] = inputs["image_index"].masked_fill(of_heads, -1)
    found, expected = (solve(case, impl, cotangents(problem)) for case in (by_bias, absent))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def assert_masked_images_may_be_anything(impl: str) -> None:
    """Checks that NaN in images that image_mask excludes changes nothing, and that their gradients are 0."""
    problem = PROBLEMS["dense"]
    inputs = problem.inputs(torch.float32)
    expected = solve(inputs, impl, cotangents(problem))
    absent = ~inputs["image_mask"][:, None, :, :, None]  # (B, 1, Tq, K, 1)
    filled = {name: inputs[name].masked_fill(absent, torch.nan) for name in ("image_k", "image_v")}
    assert_identical(solve({**inputs, **filled}, impl, cotangents(problem)), expected)
    for name in ("image_k", "image_v"):
        assert not (expected[name] * absent).any(), name


def assert_unused_keys_may_be_anything(impl: str, problem: Problem) -> None:
    """Checks that NaN in the keys and values from cache_seqlens on changes nothing, and that their gradients are 0."""
    inputs = problem.inputs(torch.float32)
    grads = cotangents(problem)
    expected = solve(inputs, impl, grads)
    unused = torch.arange(problem.num_keys) >= inputs["cache_seqlens"][:, None]  # (B, Tk)
    assert unused.any()
    filled = {name: inputs[name].masked_fill(unused[:, None, :, None], torch.nan) for name in ("k", "v")}
    assert_identical(solve({**inputs, **filled}, impl, grads), expected)
    for name in ("k", "v"):
        assert not expected[name].transpose(1, 2)[unused].any(), name


def assert_unseen_gradient_of_lse_is_ignored(impl: str, problem: Problem) -> None:
    """Checks a query that sees nothing: a NaN as the gradient of its lse, as merging by log-sum-exp produces, changes
    no gradient, and the query's own gradient is zero."""
    inputs = problem.inputs(torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k")]
    _, lse = visual_fusion_attn(**inputs, return_lse=True, impl=impl)
    unseen = lse == -torch.inf
    assert unseen.any() and not unseen.all()
    with_zero, with_nan = (
        torch.autograd.grad(lse, leaves, torch.ones_like(lse).masked_fill(unseen, nothing), retain_graph=True)
        for nothing in (0.0, torch.nan)
    )
    assert all(zero.equal(nan) for zero, nan in zip(with_zero, with_nan, strict=True))
    assert not with_zero[0][unseen].any()


# The problems that an implementation must solve. Sizes cross the borders of 16-, 32-, 64- and 128-wide tiles.
# `make test` runs these in Triton's interpreter too. Between them they take every branch of the kernels.
QUICK = {
    "dense": Problem(),
    "pooled": Problem(pool_size=11),
    "no images": Problem(num_images=0),
    "no slots": Problem(num_images=0, pool_size=11, image_q=True, score_bias=True),
    "empty pool": Problem(pool_size=0, score_bias=True),
    "one image": Problem(num_images=1, biases=False, gaps=False),
    "one token": Problem(num_queries=1, batch=9),
    "decode": Problem(num_queries=1, prefix=300, batch=8, pool_size=5, scale=0.15),
    "decode few": Problem(num_queries=5, prefix=129, batch=4, scale=0.15),
    "prefix": Problem(prefix=37, pool_size=11, scale=0.15),
    "not causal": Problem(causal=False, prefix=3),
    "multi-query": Problem(query_heads=4, kv_heads=1, scale=0.15),
    "group of three": Problem(query_heads=6),
    "group of three, pooled": Problem(query_heads=3, kv_heads=1, pool_size=11, first_key="documents"),
    "large group": Problem(batch=1, query_heads=20, kv_heads=1, num_queries=6, prefix=3, num_images=2),
    "odd head": Problem(head_dim=13, num_queries=33),
    "odd wide head": Problem(head_dim=133, num_queries=33, prefix=20, batch=3, num_images=2),
    "heads first": Problem(tokens_first=False, num_queries=66),
    "documents with prefix": Problem(first_key="documents", num_queries=80, prefix=16),
    "cu_seqlens, rows": Problem(cu_seqlens=True, num_queries=60, pool_size=11),
    "random first_key with prefix": Problem(first_key="random", num_queries=70, prefix=20, pool_size=3),
    "striped first_key": Problem(first_key="striped", num_queries=48, num_images=0),
    "image_q": Problem(image_q=True),
    "cache_seqlens, documents": Problem(
        seqlens=True, prefix=20, first_key="documents", pool_size=11, query_heads=6, num_queries=70, batch=3
    ),
    "image weights, pooled": Problem(
        weights=True, pool_size=11, first_key="random", num_queries=70, softcap=1.5, image_q=True, score_bias=True
    ),
    "image_score_bias": Problem(score_bias=True, query_heads=6),
    "by head, all options": Problem(
        **{"pool_size": 11, "by_head": True, "query_heads": 6, "num_queries": 35, "first_key": "documents"},
        **{"image_q": True, "softcap": 1.5, "score_bias": True, "weights": True},
    ),
}
# The interpreter runs the others every night: they repeat branches with other sizes and pairs of options.
PROBLEMS = QUICK | {
    "multi-head": Problem(query_heads=3, kv_heads=3, pool_size=300),
    "group of three, decode": Problem(query_heads=6, num_queries=1, prefix=129, batch=8),
    "large group, pooled": Problem(batch=1, query_heads=20, kv_heads=1, num_queries=6, num_images=2, pool_size=5),
    "smallest head": Problem(head_dim=8, num_queries=65),
    "head of 64": Problem(head_dim=64, num_queries=35, num_images=8),
    "head of 64, pooled": Problem(head_dim=64, pool_size=9, first_key="documents"),
    "wide head": Problem(head_dim=80, pool_size=9, num_images=8),
    "widest head": Problem(head_dim=256, num_queries=20, num_images=5),
    "head of 200": Problem(
        **{"head_dim": 200, "num_queries": 33, "prefix": 5, "query_heads": 6, "pool_size": 11},
        **{"first_key": "documents", "seqlens": True, "softcap": 1.5},
    ),
    "many images": Problem(num_images=64, num_queries=20, pool_size=40),
    "documents": Problem(first_key="documents", num_queries=150, pool_size=11),
    "cu_seqlens": Problem(cu_seqlens=True, batch=1, num_queries=80, pool_size=11),
    "cu_seqlens, rows with prefix": Problem(cu_seqlens=True, num_queries=40, prefix=20),
    "cu_seqlens, no images": Problem(cu_seqlens=True, batch=1, num_queries=80, num_images=0),
    "cu_seqlens, random first_key with prefix": Problem(
        cu_seqlens=True, batch=1, first_key="random", num_queries=40, prefix=20
    ),
    "left padding": Problem(first_key="left_padding", num_queries=70),
    "left padding decode": Problem(first_key="left_padding", num_queries=1, prefix=60, batch=3),
    "sliding window": Problem(first_key="sliding_window", num_queries=200, pool_size=11),
    "random first_key": Problem(first_key="random", num_queries=150),
    "descending first_key": Problem(first_key="descending", num_queries=70, prefix=5, pool_size=3),
    "alternating first_key": Problem(first_key="alternating", num_queries=48, pool_size=3),
    "extreme first_key": Problem(first_key="extreme", num_queries=70, pool_size=3),
    "random first_key not causal": Problem(first_key="random", num_queries=70, causal=False, num_images=0),
    "image_q, pooled": Problem(image_q=True, pool_size=11, query_heads=6, num_queries=35),
    "cache_seqlens": Problem(seqlens=True, prefix=37),
    "cache_seqlens, random first_key": Problem(
        seqlens=True, prefix=40, first_key="random", num_images=0, softcap=1.5, num_queries=33
    ),
    "cache_seqlens, not causal": Problem(seqlens=True, prefix=40, causal=False, batch=3, pool_size=3),
    "cache_seqlens, decode": Problem(
        seqlens=True, num_queries=1, prefix=300, batch=8, pool_size=5, first_key="left_padding"
    ),
    "image weights": Problem(weights=True, query_heads=6),
    "image weights, large group": Problem(
        weights=True, batch=1, query_heads=20, kv_heads=1, num_queries=6, num_images=2, pool_size=5
    ),
    "image weights, decode": Problem(weights=True, num_queries=1, prefix=300, batch=8, pool_size=5),
    "image_score_bias, pooled": Problem(
        score_bias=True, pool_size=11, first_key="documents", num_queries=80, softcap=1.5, image_q=True
    ),
    "image_score_bias, large group": Problem(
        score_bias=True, batch=2, query_heads=40, kv_heads=2, num_queries=6, num_images=2, gaps=False
    ),
    "image_score_bias, decode": Problem(score_bias=True, num_queries=1, prefix=100, batch=8, pool_size=5),
    "by head": Problem(pool_size=11, by_head=True, num_queries=20),
    "by head, wide": Problem(pool_size=7, by_head=True, num_queries=20, head_dim=64),
    "by head, decode": Problem(pool_size=5, by_head=True, num_queries=1, prefix=300, batch=8),
    "by head, one head": Problem(pool_size=7, by_head=True, query_heads=4, kv_heads=1, num_queries=20),
    "softcap": Problem(softcap=1.5),
    "softcap, no images": Problem(softcap=1.5, num_images=0, num_queries=150),
    "softcap, image_q, pooled": Problem(softcap=1.5, image_q=True, pool_size=11, first_key="documents", num_queries=80),
    "softcap, prefix": Problem(softcap=1.5, prefix=37, query_heads=6, image_q=True),
    "softcap, random first_key": Problem(softcap=1.5, first_key="random", num_queries=150),
    "softcap, left padding": Problem(softcap=1.5, first_key="left_padding", num_queries=70, tokens_first=False),
    "softcap, not causal": Problem(softcap=1.5, causal=False, prefix=3, num_queries=135),
    "softcap, decode": Problem(softcap=1.5, num_queries=1, prefix=100, batch=8, pool_size=5),
    "softcap, one token": Problem(softcap=1.5, image_q=True, num_queries=1, batch=9),
    "softcap, small": Problem(softcap=0.3, num_queries=20),
    "softcap, wide": Problem(softcap=50.0, num_queries=20, scale=1.0),
}


CACHES = {name: problem for name, problem in PROBLEMS.items() if problem.seqlens}

_BEYOND_32_BITS = Problem(batch=1, query_heads=2, kv_heads=2, num_queries=4, num_images=2, gaps=False, biases=False)
BEYOND_32_BITS = {"dense": _BEYOND_32_BITS, "pooled": replace(_BEYOND_32_BITS, pool_size=5)}


def far_apart(inputs: dict[str, Tensor | bool | None]) -> Iterator[tuple[str, Tensor]]:
    """Spreads each 16-bit tensor of `inputs`: heads, positions, slots or pool rows are 2^31 elements or more apart.
    Only the pages of the rows themselves are touched."""
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**32 + 64)), dtype=torch.float16)
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float16:
            continue
        for dimension in range(tensor.dim() - 1):
            size = tensor.shape[dimension]
            if size > 1:
                stride = list(torch.empty(tensor.shape, device="meta").stride())
                stride[dimension] = 2**31 // (size - 1) + 1
                far = memory.as_strided(tensor.shape, stride)
                yield name, far.copy_(tensor)
