"""visual_fusion_attn under torch.func, forward-mode differentiation, functionalization and export: each is right, or
raises an error that says what to do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.tolerance import assert_agree
from tests.valm_kernels.visual_fusion.problems import Problem, differentiable
from valm_kernels import visual_fusion_attn

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
PROBLEMS = {
    "dense": Problem(batch=1, num_queries=9, prefix=2, head_dim=8),
    "pooled": Problem(batch=2, num_queries=6, head_dim=8, pool_size=4, image_q=True, score_bias=True, softcap=2.0),
    "by head": Problem(batch=1, num_queries=6, head_dim=8, pool_size=4, by_head=True),
    "documents": Problem(batch=1, num_queries=9, head_dim=8, num_images=0, cu_seqlens=True),
}


def function(problem: Problem) -> tuple[Callable[..., Tensor], list[str], list[Tensor]]:
    """A scalar of out and lse as a function of the differentiable inputs; their names, and the inputs."""
    inputs = problem.inputs(torch.float32)
    names = list(differentiable(inputs))
    if inputs.get("image_score_bias") is not None:
        inputs["image_score_bias"].nan_to_num_()

    def scalar(*tensors: Tensor) -> Tensor:
        given = {**inputs, **dict(zip(names, tensors, strict=True))}
        out, lse = visual_fusion_attn(**given, impl="cpu", return_lse=True)
        return out.sin().sum() + lse.sin().sum()

    return scalar, names, [inputs[name].contiguous() for name in names]


def gradients(scalar: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(scalar(*leaves), leaves)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_agree(one, other)


@pytest.mark.parametrize("name", PROBLEMS)
def test_first_derivatives_and_batches(name):
    """In every order of nesting they are those of plain autograd and of one call after the other."""
    scalar, names, tensors = function(PROBLEMS[name])
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


def dual(f: Callable[[Tensor], Tensor], primal: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(primal, torch.ones_like(primal)))).tangent


func = torch.func
FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(f)(x),
    "jacfwd of jacfwd": lambda f, x: func.jacfwd(func.jacfwd(f))(x),
    "linearize": lambda f, x: func.linearize(f, x)[1](x),
    "vmap of jvp": lambda f, x: func.vmap(lambda row: func.jvp(f, (row,), (row,)))(x[None]),
    "jvp of vmap": lambda f, x: func.jvp(func.vmap(f), (x[None],), (x[None],)),
    "jvp of grad": lambda f, x: func.jvp(func.grad(f), (x,), (x,)),
    "forward_ad": dual,
    "forward_ad under no_grad": torch.no_grad()(dual),
    "forward_ad beside autograd": lambda f, x: dual(f, x.clone().requires_grad_()),
}
TWICE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad of grad": lambda f, x: func.grad(lambda y: func.grad(f)(y).square().sum())(x),
    "jacrev of jacrev": lambda f, x: func.jacrev(func.jacrev(f))(x),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_mode_and_second_derivatives_raise(name):
    """For each input alone, in whatever way they are asked for."""
    scalar, names, tensors = function(PROBLEMS[name])
    for place, of_input in enumerate(names):

        def of_one(value: Tensor, place: int = place) -> Tensor:
            return scalar(*tensors[:place], value, *tensors[place + 1 :])

        for asked, message in ((FORWARD_MODE, "no forward-mode derivative"), (TWICE, "differentiated only once")):
            for how, call in asked.items():
                with pytest.raises(NotImplementedError, match=f'{message}.* use impl="reference"'):
                    pytest.fail(f"{how} by {of_input} returned {call(of_one, tensors[place])}")


@pytest.mark.parametrize("name", PROBLEMS)
def test_functionalization_and_export(name):
    scalar, names, tensors = function(PROBLEMS[name])
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


def test_transforms_compile():
    scalar, names, tensors = function(PROBLEMS["pooled"])
    of_each = torch.func.vmap(torch.func.grad(scalar, tuple(range(len(names)))))
    torch.compiler.reset()
    compiled = torch.compile(of_each, fullgraph=True, backend="aot_eager")
    batches = [torch.stack([tensor, tensor + 0.25]) for tensor in tensors]
    assert_close(compiled(*batches), of_each(*batches))
