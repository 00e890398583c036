"""impl="flash+triton" under Triton's interpreter, where the flash attention of CPUs stands in for that of CUDA;
test_interpreted.py starts the process."""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py with TRITON_INTERPRET=1", allow_module_level=True)

from tests.tolerance import assert_agree
from tests.valm_kernels.visual_fusion import test_flash as text
from tests.valm_kernels.visual_fusion import test_varlen as varlen
from tests.valm_kernels.visual_fusion.problems import PROBLEMS, QUICK, Problem, assert_passes_nan_on, assert_solves
from tests.valm_kernels.visual_fusion.triton.guarded_interpreter import guarded
from tests.valm_kernels.visual_fusion.triton.small_tiles import made_small, quick_or_slow, use_small_tiles
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import flash
from valm_kernels.visual_fusion.triton import joined


@pytest.fixture(autouse=True)
def no_determinism_asked(monkeypatch):
    """The suite asks for it, as PyTorch then fills new memory with NaN, which is not changed here."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


def served() -> list[str]:
    """Problems whose loss has no gradient of lse."""

    def serves(problem: Problem) -> bool:
        options = problem.first_key or problem.seqlens or problem.softcap
        sees_all = not problem.prefix or not problem.causal or problem.num_queries == 1
        return not (options or problem.weights) and problem.head_dim % 8 == 0 and sees_all

    return [name for name, problem in PROBLEMS.items() if serves(problem)]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("name", quick_or_slow(served(), QUICK))
def test_agrees_with_float64_reference(monkeypatch, name, dtype):
    """The slow dtype has the problems in their sizes."""
    problem = made_small(PROBLEMS[name]) if dtype == torch.bfloat16 else PROBLEMS[name]
    use_small_tiles(monkeypatch, problem)
    monkeypatch.setattr(joined.triton_backward, "key_gradients", lambda *_: pytest.fail("reads keys in Triton"))
    with guarded():
        assert_solves(flash.NAME, problem, dtype, with_lse=False)


def served_by_cudnn() -> list[str]:
    found = ((name, PROBLEMS[name]) for name in served())
    return [name for name, p in found if not p.cu_seqlens and p.num_queries > 1 and p.head_dim <= flash.CUDNN_DIM]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("name", quick_or_slow(served_by_cudnn(), ("pooled", "not causal", "group of three")))
def test_agrees_with_float64_reference_where_cudnn_reads_the_text(monkeypatch, name, dtype):
    text.read_with_cudnn(monkeypatch)
    test_agrees_with_float64_reference(monkeypatch, name, dtype)


@pytest.mark.parametrize(
    ("name", "with_lse", "deterministic"),
    [("pooled", True, False), ("image weights", False, False), ("pooled", False, True)],
)
def test_gradients_that_triton_computes(monkeypatch, name, with_lse, deterministic):
    """Where lse has a gradient, which flash attention does not take; and where determinism is asked for, as the order
    in which its backward adds up dq may differ from run to run."""
    problem = replace(PROBLEMS[name], num_queries=20)
    use_small_tiles(monkeypatch, problem)
    monkeypatch.setattr(flash, "text_backward", lambda *_: pytest.fail("is flash attention's"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert_solves(flash.NAME, problem, torch.float16, with_lse)


@pytest.mark.parametrize("name", ["q", "image_k", "image_v"])
def test_nan_is_passed_on(name):
    assert_passes_nan_on(flash.NAME, name, torch.float16)


@pytest.mark.parametrize("needed", ["q", "k", "image_v"])
def test_one_gradient_alone(monkeypatch, needed):
    inputs = PROBLEMS["dense"].inputs(torch.float16)
    if needed == "image_v":
        monkeypatch.setattr(flash, "text_backward", lambda *_: pytest.fail("no gradient of the text is needed"))
    found, expected = (
        torch.autograd.grad(visual_fusion_attn(**inputs | {needed: leaf}, impl=impl).sum(), leaf)[0]
        for impl in (flash.NAME, "triton")
        for leaf in [inputs[needed].clone().requires_grad_()]
    )
    assert_agree(found, expected)


def test_keys_are_read_by_flash_attention_alone(monkeypatch):
    """The kernel does not read k and v, which may be anything once the text's own part is there."""
    inputs = PROBLEMS["dense"].inputs(torch.float16)
    expected = visual_fusion_attn(**inputs, impl=flash.NAME)
    text_forward = flash.text_forward

    def then_spoiled(of):
        result = text_forward(of)
        for keys in (of.k, of.v):
            keys.fill_(torch.nan)
        return result

    monkeypatch.setattr(flash, "text_forward", then_spoiled)
    assert visual_fusion_attn(**inputs, impl=flash.NAME).equal(expected)


def test_triton_alone_runs_the_kernel_of_keys(monkeypatch):
    """What a test above forbids is there to be forbidden."""
    calls = []
    monkeypatch.setattr(joined.triton_backward, "key_gradients", lambda *_: calls.append(_))
    inputs = PROBLEMS["dense"].inputs(torch.float16)
    inputs["k"].requires_grad_()
    visual_fusion_attn(**inputs, impl="triton").sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(("impl", "dtype"), [("triton", torch.float32), (flash.NAME, torch.bfloat16)])
@pytest.mark.parametrize("name", ["pooled", pytest.param("dense", marks=pytest.mark.slow)])
def test_packed_documents(monkeypatch, name, impl, dtype):
    problem = varlen.PROBLEMS[name]
    use_small_tiles(monkeypatch, problem)
    with guarded():
        varlen.assert_packs(impl, problem, dtype, with_lse=False)
