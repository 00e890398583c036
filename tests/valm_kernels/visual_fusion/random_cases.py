"""Random problems of visual_fusion_attn with all its options, and the errors of an implementation on them."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tests.valm_kernels.visual_fusion.problems import DIFFERENTIABLE, FIRST_KEYS, Problem, cotangents, solve

Cotangents = tuple[Tensor | None, ...]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALLOWED = 2
# Precision of exp in PyTorch's flash attention on CPU for 16-bit tensors, whose sum in lse is float32.
FLASH_EXP = 2**-15
# Most elements of the image keys of all query heads, so that a case takes about 30 ms.
LARGEST = 1 << 19
LAYOUTS = ("as is", "strided rows", "reversed dimensions", "expanded")


@dataclass(frozen=True)
class Case:
    problem: Problem
    dtype: torch.dtype
    with_lse: bool  # the loss also depends on lse
    layout: str  # of q, k, v, image_q and the images in memory
    hidden: bool  # hidden inputs are NaN, and some score biases are -inf


def random_case(number: int) -> Case:
    # seeded by a string: then Python's generator is equal in all versions
    draw = random.Random(f"attention {number}")
    chance = draw.random
    batch, kv_heads = draw.randint(1, 3), draw.choice((1, 1, 2, 3))
    query_heads = kv_heads * draw.choice((1, 1, 2, 3, draw.randint(1, 20)))
    num_images = draw.choice((0, 1, 2, 3, 4, 5, 8, draw.randint(0, 64)))
    head_dim = draw.choice((8, 16, 24, 64, 64, draw.randint(8, 128), draw.randint(8, 256)))
    affordable = max(1, LARGEST // (batch * query_heads * head_dim * (num_images + 1)))
    causal = chance() < 0.85
    packed = causal and chance() < 0.4
    problem = Problem(
        batch=batch,
        kv_heads=kv_heads,
        query_heads=query_heads,
        num_queries=min(affordable, draw.choice((1, draw.randint(1, 16), draw.randint(1, 100)))),
        prefix=draw.choice((0, 0, draw.randint(0, 80))),
        head_dim=head_dim,
        num_images=num_images,
        pool_size=draw.choice((None, draw.randint(1, 40))),
        by_head=random.Random(f"by head {number}").random() < 0.3,
        first_key=draw.choice((None, *FIRST_KEYS)) if chance() < 0.5 else None,
        cu_seqlens=packed,
        seqlens=not packed and chance() < 0.2,
        causal=causal,
        scale=None if chance() < 0.7 else 10 ** draw.uniform(-2, 0),
        softcap=None if chance() < 0.75 else 10 ** draw.uniform(-0.5, 1.7),
        image_q=chance() < 0.3,
        biases=chance() < 0.7,
        score_bias=num_images > 0 and chance() < 0.3,
        weights=num_images > 0 and chance() < 0.2,
        gaps=chance() < 0.7,
        tokens_first=chance() < 0.7,
        seed=number,
    )
    return Case(problem, draw.choice(DTYPES), chance() < 0.5, draw.choice(LAYOUTS), chance() < 0.3)


def case_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor | bool | None]:
    """Keyword arguments, equal for every dtype."""
    inputs = case.problem.inputs(dtype)
    if case.layout == "expanded":  # all text heads share one key and value, all batch rows one query
        inputs["k"], inputs["v"] = (inputs[name][:, :1].expand_as(inputs[name]) for name in ("k", "v"))
        inputs["q"] = inputs["q"][:1].expand_as(inputs["q"])
    if case.hidden:
        _hide(inputs, case.problem.seed)
    for name in DIFFERENTIABLE[:6]:
        if inputs.get(name) is not None:
            inputs[name] = _laid_out(inputs[name], case.layout)
    return inputs


def _hide(inputs: dict[str, Tensor | bool | None], seed: int) -> None:
    """Writes NaN where nothing may be read: keys from cache_seqlens on, and masked images."""
    if inputs.get("cache_seqlens") is not None:
        unused = torch.arange(inputs["k"].shape[2]) >= inputs["cache_seqlens"][:, None]
        for name in ("k", "v"):
            inputs[name] = inputs[name].masked_fill(unused[:, None, :, None], torch.nan)
    if inputs.get("image_mask") is not None:
        for name in ("image_k", "image_v"):
            inputs[name] = inputs[name].masked_fill(~inputs["image_mask"][:, None, :, :, None], torch.nan)
    if inputs.get("image_score_bias") is not None:
        bias = inputs["image_score_bias"]
        excluded = torch.rand(bias.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
        inputs["image_score_bias"] = bias.masked_fill(excluded & bias.isfinite(), -torch.inf)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "strided rows":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "reversed dimensions":
        order = list(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    return tensor


class Error(NamedTuple):
    """The RMS error of a result as a multiple of the allowed error.

    of_eager: of the error of eager code and a unit in the last place. of_bound: of that, and of what the rounding
    inside the backward of a flash attention adds to a gradient.
    """

    of_eager: float
    of_bound: float


def attention_errors(number: int, impl: str) -> tuple[str, dict[str, Error]]:
    """The dtype of case `number`, and the error of each result of `impl`.

    Raises:
        AssertionError: a result is NaN, of a wrong shape, dtype or infinity, or off by more than `ALLOWED` bounds.
    """
    case = random_case(number)
    if impl == "triton" and case.dtype == torch.bfloat16:
        case = replace(case, dtype=torch.float16)  # Triton's interpreter computes bfloat16 wrongly
    grads = cotangents(case.problem, case.with_lse)
    truth = solve(case_inputs(case, torch.float64), "reference", grads)
    eager = solve(case_inputs(case, case.dtype), "reference", grads)
    actual = solve(case_inputs(case, case.dtype), impl, grads)
    assert actual.keys() == truth.keys()

    def errors(draws: int) -> dict[str, Error]:
        rounding = _internal_rounding(case, grads, truth, draws)
        return {
            name: _error(name, found, eager[name], truth[name], rounding.get(name, 0.0), case)
            for name, found in actual.items()
        }

    def beyond(found: dict[str, Error]) -> dict[str, float]:
        return {name: round(error.of_bound, 1) for name, error in found.items() if not error.of_bound <= ALLOWED}

    found = errors(1)
    if beyond(found):  # if a gradient is one number, the signs of a single sample may cancel
        found = errors(16)
    assert not beyond(found), f"off by more than {ALLOWED} times its bound: {beyond(found)} in {case}"
    return str(case.dtype).removeprefix("torch."), found


def _scaled(grad: Tensor, of_queries: Tensor) -> Tensor:
    """grad (B, Hq, Tq) or (B, Hq, Tq, n) times (B, Hq, Tq)."""
    return grad * of_queries.reshape(*of_queries.shape, *[1] * (grad.dim() - 3))


def _float32_unit(case: Case) -> float:
    """The rounding of a float32 sum over the images of a query, which are added one after the other."""
    return torch.finfo(torch.float32).eps * (1 + case.problem.num_images / 32)


def _internal_rounding(case: Case, grads: Cotangents, truth: dict[str, Tensor], draws: int) -> dict[str, float]:
    """The RMS of what the rounding inside adds to each gradient, with random signs.

    delta = sum(grad_out * out) - grad_lse, and the product grad_out.v that it is subtracted from, are each off by a
    unit of their terms, and by a float32 unit of their sum. The gradient of lse is subtracted from delta, so it stands
    for that. The weights exp(score - lse) of a query are off by a float32 unit of lse, as if its gradients were scaled.
    """
    eps, wide_eps = torch.finfo(case.dtype).eps, _float32_unit(case)
    terms = grads[0] * truth["out"]
    squares = (eps * terms).square().sum(-1) + (wide_eps * terms.sum(-1)).square()
    if grads[1] is not None:
        squares += (eps * grads[1]).square()
    if len(grads) == 3:
        squares += (eps * grads[2] * truth["image_weights"]).square().sum(-1)
    delta_unit = 2 * squares.sqrt()
    weight_unit = wide_eps * truth["lse"].abs().nan_to_num(posinf=0).clamp(min=1)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, float] = defaultdict(float)
    for _ in range(draws):
        of_delta, of_weights = (
            torch.randn(unit.shape, generator=generator).sign() * unit for unit in (delta_unit, weight_unit)
        )
        out, lse, *weights = (None if grad is None else _scaled(grad, of_weights) for grad in grads)
        solved = solve(
            case_inputs(case, torch.float64), "reference", (out, of_delta if lse is None else lse + of_delta, *weights)
        )
        for name in solved.keys() & set(DIFFERENTIABLE):
            sums[name] += float(solved[name].square().mean()) / draws
    return {name: total**0.5 for name, total in sums.items()}


def _error(name: str, actual: Tensor, eager: Tensor, truth: Tensor, rounding: float, case: Case) -> Error:
    assert actual.shape == truth.shape and actual.dtype == eager.dtype, f"{name}: {actual.shape} {actual.dtype}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()}"
    finite = truth.isfinite()
    assert actual[~finite].double().equal(truth[~finite]), f"{name}: wrong where the truth is infinite"
    if not finite.any():
        return Error(0, 0)

    def rms(values: Tensor) -> float:
        return float(values[finite].double().square().mean().sqrt())

    of_float32 = case.dtype == torch.float32 or name in ("lse", "image_weights")
    unit = _float32_unit(case) if of_float32 else torch.finfo(case.dtype).eps
    unit *= float(truth[finite].abs().max())
    if name == "lse" and case.dtype.itemsize == 2:
        unit = max(unit, FLASH_EXP)
    ours, allowed = rms(actual.double() - truth), rms(eager.double() - truth) + unit
    return Error(*(ours / most if most else ours and float("inf") for most in (allowed, allowed + rounding)))
