from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm_kernels.visual_fusion.problems import PROBLEMS, cotangents, differentiable, solve
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import cpu
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.layout import empty_tokens_first

forward_op = torch.ops.valm_kernels.visual_fusion_attn.default
backward_op = torch.ops.valm_kernels.visual_fusion_attn_backward.default

NAMES = (
    *("dense", "pooled", "no images", "no slots", "prefix", "documents", "heads first"),
    *("image_q", "softcap, no images", "softcap, image_q, pooled", "image_score_bias", "image_score_bias, pooled"),
    *("cache_seqlens", "cache_seqlens, random first_key", "by head, wide"),
)


def quick_or_slow(quick):
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in product(NAMES, [0, 1])]


def op_arguments(inputs, impl="cpu", with_image_scores=False):
    return *checked_inputs(**inputs), impl, with_image_scores


@pytest.mark.parametrize(
    ("name", "in_16_bits"),
    quick_or_slow([("dense", 1), ("softcap, image_q, pooled", 0), ("cache_seqlens", 0), ("by head, wide", 0)]),
)
def test_opcheck(name, in_16_bits):
    inputs = PROBLEMS[name].inputs(torch.bfloat16 if in_16_bits else torch.float32)
    for tensor in differentiable(inputs).values():
        tensor.requires_grad_()
    torch.library.opcheck(forward_op, op_arguments(inputs))
    torch.library.opcheck(forward_op, op_arguments(inputs, with_image_scores=True))


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "softcap, image_q, pooled")), "pooled"]
)
def test_opcheck_of_strided_inputs(name):
    """No input has a contiguous last dimension: the outputs still lie where the fake kernels say."""
    inputs = PROBLEMS[name].inputs(torch.float32)
    for key, tensor in differentiable(inputs).items():
        inputs[key] = tensor.transpose(-1, 0).contiguous().transpose(-1, 0).requires_grad_()
    torch.library.opcheck(forward_op, op_arguments(inputs))


@pytest.mark.parametrize(
    ("name", "with_lse"), quick_or_slow([("dense", 0), ("softcap, image_q, pooled", 1), ("by head, wide", 1)])
)
def test_opcheck_backward(name, with_lse):
    problem = PROBLEMS[name]
    arguments = op_arguments(problem.inputs(torch.float32), with_image_scores=True)
    out, lse, image_scores = forward_op(*arguments)
    grad_out, grad_lse = cotangents(problem, with_lse)
    of_scores = torch.randn(image_scores.shape, generator=torch.Generator().manual_seed(0)) if with_lse else None
    grads = (grad_out.float(), grad_lse.float() if with_lse else None, of_scores)
    for needed in ([True] * 10, [False, True] * 5):
        torch.library.opcheck(backward_op, (*grads, out, lse, *arguments[:-1], needed))


@pytest.mark.parametrize(
    ("name", "return_lse", "backend"),
    [
        pytest.param("pooled", True, "inductor", marks=pytest.mark.slow),
        ("dense", False, "aot_eager"),
        ("pooled", False, "aot_eager"),
        ("documents", True, "aot_eager"),
        ("no images", True, "aot_eager"),
        ("image_score_bias, pooled", True, "aot_eager"),
        ("cache_seqlens, documents", True, "aot_eager"),
        ("cu_seqlens", True, "aot_eager"),
        ("by head, all options", True, "aot_eager"),
    ],
)
# a graph that an earlier version of the operator left on disk is found by the operator's name alone
@torch.compiler.config.patch(force_disable_caches=True)
def test_compiles_whole_forward_and_backward(name, return_lse, backend):
    inputs = PROBLEMS[name].inputs(torch.float32)
    names = list(differentiable(inputs))

    def loss(*tensors):
        result = visual_fusion_attn(**{**inputs, **dict(zip(names, tensors, strict=True))}, return_lse=return_lse)
        return result[0].sin().sum() + result[1].sin().sum() if return_lse else result.sin().sum()

    torch.compiler.reset()
    leaves = [inputs[n].requires_grad_() for n in names]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*leaves), leaves)
    for leaf, a, e in zip(names, actual, expected, strict=True):
        assert_agree(a, e, leaf)


def test_compiles_with_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(visual_fusion_attn, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 17, 33):
        inputs = replace(PROBLEMS["pooled"], num_queries=length).inputs(torch.float32)
        assert_agree(compiled(**inputs), visual_fusion_attn(**inputs))


def test_generation_in_a_static_cache_compiles_once():
    """Token by token in a cache of constant shape, the rest of it NaN: one graph for all steps, with the results of the
    whole text at once."""
    problem = replace(PROBLEMS["pooled"], num_queries=64)
    inputs = problem.inputs(torch.float32)
    expected = visual_fusion_attn(**inputs)
    caches = {name: torch.full_like(inputs[name], torch.nan) for name in ("k", "v")}
    lengths = torch.zeros(problem.batch, dtype=torch.int32)
    fixed = {name: t for name, t in inputs.items() if name.startswith("image_") and name != "image_index"}

    def step(q, k, v, image_index, position):
        caches["k"].index_copy_(2, position, k)
        caches["v"].index_copy_(2, position, v)
        lengths.add_(1)
        return visual_fusion_attn(q, **caches, image_index=image_index, cache_seqlens=lengths, **fixed)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for token in range(problem.num_queries):
        at = slice(token, token + 1)
        new = (inputs[name][:, :, at].contiguous() for name in "qkv")
        with torch._dynamo.config.patch(error_on_recompile=token > 0):
            out = compiled(*new, inputs["image_index"][:, at].contiguous(), torch.tensor([token]))
        assert_agree(out, expected[:, :, at])


def test_opcheck_of_documents():
    torch.library.opcheck(torch.ops.valm_kernels.document_starts.default, (torch.tensor([0, 3, 7]).int(), 1, 5, 7, 4))


def test_a_compiled_graph_checks_cu_seqlens():
    inputs = PROBLEMS["cu_seqlens"].inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(visual_fusion_attn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), visual_fusion_attn(**inputs))
    inputs["cu_seqlens"][3] = 1
    with pytest.raises(ValueError, match="cu_seqlens must not fall"):
        compiled(**inputs)


def test_double_backward_raises():
    inputs = PROBLEMS["dense"].inputs(torch.float32)
    inputs["q"].requires_grad_()
    (gradient,) = torch.autograd.grad(visual_fusion_attn(**inputs).sin().sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated only once"):
        gradient.sum().backward()


def test_unused_results_cost_nothing(monkeypatch):
    seen = []
    original = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: seen.append(a[1:3]) or original(*a))
    problem = PROBLEMS["dense"]
    solve(problem.inputs(torch.float32), "cpu", cotangents(problem, with_lse=False))
    assert seen == [(None, None)]


@pytest.mark.parametrize("name", ["dense", "pooled", "image_q"])
def test_text_has_no_backward_where_only_images_need_gradients(monkeypatch, name):
    """As in a frozen model with a trained norm of the images."""
    problem = PROBLEMS[name]
    inputs, (grad_out, _) = problem.inputs(torch.float32), cotangents(problem)
    expected = solve(inputs, "cpu", (grad_out, None))
    monkeypatch.setattr(cpu, "_text_backward", lambda *_: pytest.fail("computes gradients of the text"))
    leaves = {n: inputs[n].requires_grad_() for n in expected if n.startswith("image_")}
    gradients = torch.autograd.grad(visual_fusion_attn(**inputs), list(leaves.values()), grad_out.float())
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.equal(expected[leaf]), leaf


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_layouts(tokens_first, softcap):
    """out is laid out like q, the gradients as a projection's backward reads them."""
    problem = replace(PROBLEMS["image_q"], tokens_first=tokens_first, softcap=softcap)
    results = solve(problem.inputs(torch.float32), "cpu", cotangents(problem))
    inputs = problem.inputs(torch.float32)
    assert results["out"].stride() == inputs["q"].stride()
    assert results["lse"].is_contiguous()
    for name in ("q", "k", "v", "image_q"):
        assert results[name].stride() == empty_tokens_first(inputs[name]).stride(), name
    assert results["image_k"].stride() == inputs["image_k"].stride()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_wide_softcap_changes_nothing(impl):
    inputs = PROBLEMS["pooled"].inputs(torch.float64)
    expected = visual_fusion_attn(**inputs, impl=impl)
    assert_agree(visual_fusion_attn(**inputs, softcap=1e8, impl=impl), expected)
    assert not visual_fusion_attn(**inputs, softcap=1.0, impl=impl).allclose(expected, rtol=1e-3)
