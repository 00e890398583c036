"""visual_fusion_attn under torch.func, forward-mode differentiation, functionalization and export: each is right, or
raises an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.tolerance import assert_agree
from tests.valm_kernels.visual_fusion.problems import DIFFERENTIABLE, Problem
from valm_kernels import visual_fusion_attn

PROBLEMS = {
    "dense": Problem(batch=1, num_queries=9, prefix=2, head_dim=8),
    "pooled": Problem(batch=2, num_queries=6, head_dim=8, pool_size=4, image_q=True, score_bias=True, softcap=2.0),
    "by head": Problem(batch=1, num_queries=6, head_dim=8, pool_size=4, by_head=True),
    "documents": Problem(batch=1, num_queries=9, head_dim=8, num_images=0, cu_seqlens=True),
}


def function(impl: str, problem: Problem) -> tuple[Callable[..., Tensor], list[str], list[Tensor]]:
    """A scalar of out and lse as a function of the differentiable inputs; their names, and the inputs."""
    inputs = problem.inputs(torch.float32)
    names = [name for name in DIFFERENTIABLE if inputs.get(name) is not None]
    if inputs["image_k"] is None:
        names = ["q", "k", "v"]
    if inputs.get("image_score_bias") is not None:
        inputs["image_score_bias"].nan_to_num_()

    def scalar(*tensors: Tensor) -> Tensor:
        given = {**inputs, **dict(zip(names, tensors, strict=True))}
        out, lse = visual_fusion_attn(**given, impl=impl, return_lse=True)
        return out.sin().sum() + lse.sin().sum()

    return scalar, names, [inputs[name].contiguous() for name in names]


def gradients(scalar: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(scalar(*leaves), leaves)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_agree(one, other)


def assert_transforms(impl: str, problem: Problem) -> None:
    """First derivatives and batches, in every order of nesting, are those of plain autograd and of one call after the
    other."""
    scalar, names, tensors = function(impl, problem)
    every = tuple(range(len(names)))
    expected = gradients(scalar, tensors)
    assert_close(torch.func.grad(scalar, every)(*tensors), expected)
    assert_close(torch.func.vjp(scalar, *tensors)[1](torch.ones(())), expected)
    assert_close(torch.func.jacrev(scalar, every)(*tensors), expected)
    with torch.no_grad():  # which is the caller's, not the transform's
        assert_close(torch.func.grad(scalar, every)(*tensors), expected)

    other = [tensor + 0.25 for tensor in tensors]
    batches = [torch.stack(pair) for pair in zip(tensors, other, strict=True)]
    of_each = [torch.stack(pair) for pair in zip(expected, gradients(scalar, other), strict=True)]
    results = torch.stack([scalar(*tensors), scalar(*other)])
    torch.testing.assert_close(torch.func.vmap(scalar)(*batches), results)
    assert_close(torch.func.vmap(torch.func.grad(scalar, every))(*batches), of_each)
    summed = torch.func.grad(lambda *some: torch.func.vmap(scalar)(*some).sum(), every)
    assert_close(summed(*batches), of_each)

    def scaled(factor: Tensor, *given: Tensor) -> Tensor:  # as of a parameter, for each example
        return scalar(*(factor * tensor for tensor in given))

    one = torch.ones(())
    by_example = torch.func.vmap(torch.func.grad(scaled), (None, *[0] * len(batches)))(one, *batches)
    found = [gradients(scaled, [one, *given])[0] for given in (tensors, other)]
    assert_agree(by_example, torch.stack(found))


def assert_raises_where_it_has_no_derivative(impl: str, problem: Problem) -> None:
    """For each input alone: forward mode, and second derivatives, in whatever way they are asked for."""
    scalar, names, tensors = function(impl, problem)
    for place, name in enumerate(names):
        assert_one_raises(partial(_with, scalar, tensors, place), tensors[place], name)


def _with(call: Callable[..., Tensor], tensors: list[Tensor], place: int, value: Tensor) -> Tensor:
    return call(*tensors[:place], value, *tensors[place + 1 :])


def assert_one_raises(f: Callable[[Tensor], Tensor], value: Tensor, name: str) -> None:
    func = torch.func

    def dual(primal: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(primal, torch.ones_like(primal)))).tangent

    forward_mode: dict[str, Callable[[], object]] = {
        "jvp": lambda: func.jvp(f, (value,), (value,)),
        "jacfwd": lambda: func.jacfwd(f)(value),
        "hessian": lambda: func.hessian(f)(value),
        "jacfwd of jacfwd": lambda: func.jacfwd(func.jacfwd(f))(value),
        "linearize": lambda: func.linearize(f, value)[1](value),
        "vmap of jvp": lambda: func.vmap(lambda x: func.jvp(f, (x,), (x,)))(value[None]),
        "jvp of vmap": lambda: func.jvp(func.vmap(f), (value[None],), (value[None],)),
        "jvp of grad": lambda: func.jvp(func.grad(f), (value,), (value,)),
        "forward_ad": lambda: dual(value),
        "forward_ad under no_grad": lambda: torch.no_grad()(dual)(value),
        "forward_ad beside autograd": lambda: dual(value.clone().requires_grad_()),
    }
    twice: dict[str, Callable[[], object]] = {
        "grad of grad": lambda: func.grad(lambda x: func.grad(f)(x).square().sum())(value),
        "jacrev of jacrev": lambda: func.jacrev(func.jacrev(f))(value),
    }
    for asked, message in ((forward_mode, "no forward-mode derivative"), (twice, "differentiated once only")):
        for how, call in asked.items():
            with pytest.raises(NotImplementedError, match=f'{message}.* use impl="reference"'):
                pytest.fail(f"{how} by {name} returned {call()}")


def assert_functionalizes_and_exports(impl: str, problem: Problem) -> None:
    scalar, names, tensors = function(impl, problem)
    every = tuple(range(len(names)))
    expected = scalar(*tensors)
    torch.testing.assert_close(torch.func.functionalize(scalar)(*tensors), expected)
    by_transform = torch.func.functionalize(torch.func.grad(scalar))(*tensors)
    assert_agree(by_transform, gradients(scalar, tensors)[0])

    class Model(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return scalar(*given)

    exported = torch.export.export(Model(), tuple(tensors)).module()
    torch.testing.assert_close(exported(*tensors), expected)
    other = [tensor + 0.25 for tensor in tensors]
    torch.testing.assert_close(exported(*other), scalar(*other))
    # a program has the operator itself
    assert_close(gradients(exported, other), gradients(scalar, other))
    assert_close(torch.func.grad(exported, every)(*other), gradients(scalar, other))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(exported, tuple(tensors), tuple(other))


def assert_transforms_compile(impl: str, problem: Problem) -> None:
    scalar, names, tensors = function(impl, problem)
    every = tuple(range(len(names)))
    of_each = torch.func.vmap(torch.func.grad(scalar, every))
    torch.compiler.reset()
    compiled = torch.compile(of_each, fullgraph=True, backend="aot_eager")
    batches = [torch.stack([tensor, tensor + 0.25]) for tensor in tensors]
    assert_close(compiled(*batches), of_each(*batches))
