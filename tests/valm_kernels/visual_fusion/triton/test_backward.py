"""The kernels under Triton's interpreter, forward and backward; test_interpreted.py starts the process."""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py with TRITON_INTERPRET=1", allow_module_level=True)

from tests.valm_kernels.visual_fusion.problems import (
    BEYOND_32_BITS,
    CACHES,
    PROBLEMS,
    QUICK,
    Problem,
    assert_identical,
    assert_minus_infinity_is_weight_zero,
    assert_solves,
    assert_unseen_gradient_of_lse_is_ignored,
    assert_unused_keys_may_be_anything,
    differentiable,
    far_apart,
)
from tests.valm_kernels.visual_fusion.test_op import forward_op, op_arguments
from tests.valm_kernels.visual_fusion.triton.guarded_interpreter import guarded
from tests.valm_kernels.visual_fusion.triton.small_tiles import made_small, quick_or_slow, use_small_tiles
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion.triton import backward_pool


# test_guarded_interpreter.py runs all problems in their sizes, and is slow.
@pytest.mark.parametrize("name", QUICK)
def test_agrees_with_float64_reference(monkeypatch, name):
    problem = PROBLEMS[name] if name in ("dense", "pooled") else made_small(PROBLEMS[name])
    use_small_tiles(monkeypatch, problem)
    assert_solves("triton", problem, torch.float32)


# bfloat16 is tested in test_guarded_interpreter.py: the plain interpreter computes its products wrongly.
@pytest.mark.parametrize("name", quick_or_slow(["pooled", "odd head", "multi-query"], ["odd head"]))
def test_agrees_in_float16(monkeypatch, name):
    use_small_tiles(monkeypatch, PROBLEMS[name])
    assert_solves("triton", PROBLEMS[name], torch.float16, with_lse=False)


def test_one_slot_of_each_head(monkeypatch):
    """Sorted by image they are contiguous, though the index by head is a transposed view."""
    problem = Problem(5, 3, 3, num_queries=1, num_images=1, pool_size=4, by_head=True)
    use_small_tiles(monkeypatch, problem)
    assert_solves("triton", problem, torch.float32)


def prepared(monkeypatch, problem):
    """Its inputs and a gradient of out, for small tiles."""
    use_small_tiles(monkeypatch, problem)
    inputs = problem.inputs(torch.float32)
    return inputs, torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(0))


def gradients(inputs, grad_out):
    """Gradients by name of all inputs that have one, for a given gradient of the output."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in differentiable(inputs).items()}
    out = visual_fusion_attn(**{**inputs, **leaves}, impl="triton")
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out), strict=True))


@pytest.mark.parametrize("layout", quick_or_slow(["dense", "pooled"], ["dense"]))
def test_each_gradient_alone(monkeypatch, layout):
    """What is computed for one input does not depend on which others need a gradient."""
    problem = Problem(batch=1, query_heads=2, kv_heads=1, num_queries=20, image_q=True, score_bias=True, gaps=False)
    problem = replace(problem, pool_size=5 if layout == "pooled" else None)
    inputs, grad_out = prepared(monkeypatch, problem)
    together = gradients(inputs, grad_out)
    for name, expected in together.items():
        leaf = inputs[name].detach().requires_grad_()
        out = visual_fusion_attn(**{**inputs, name: leaf}, impl="triton")
        assert torch.equal(torch.autograd.grad(out, leaf, grad_out)[0], expected), name


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "pool_size", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(30, marks=pytest.mark.slow)]
)
def test_popular_images(monkeypatch, pool_size, by_head):
    """Images with more slots than a block, which begin and end anywhere in it, beside others with few or none."""
    monkeypatch.setattr(backward_pool, "BLOCK_SLOTS", 8)
    heads = {"query_heads": 6, "kv_heads": 3, "by_head": by_head}
    problem = Problem(batch=1, num_queries=21, num_images=2, pool_size=pool_size, head_dim=13, **heads)
    use_small_tiles(monkeypatch, problem)
    with guarded():
        assert_solves("triton", problem, torch.float32)


def test_first_key_skips_whole_tiles(monkeypatch):
    """Queries that see no key of a tile are not read for it, and keys that a query tile does not see neither."""
    problem = Problem(batch=1, num_queries=96, num_images=0, biases=False)
    inputs, grad_out = prepared(monkeypatch, problem)  # tiles of 32
    inputs["first_key"] = torch.arange(96)[None].int() // 32 * 32  # three documents of a tile each
    expected = gradients(inputs, grad_out)
    inputs["q"][:, :, :32] = torch.nan
    inputs["v"][:, :, :32] = torch.nan
    actual = gradients(inputs, grad_out)
    for name in ("q", "k", "v"):
        assert torch.equal(actual[name][:, :, 32:], expected[name][:, :, 32:]), name


@pytest.mark.parametrize("layout", ["dense", "pooled"])
def test_slots_without_images(monkeypatch, layout):
    """Where no slot holds an image the result is that without images, and their gradients are zero; so it is with a
    pool of no images."""
    inputs, grad_out = prepared(monkeypatch, replace(PROBLEMS[layout], batch=1, biases=False, num_queries=20))
    text = gradients({**inputs, "image_k": None, "image_v": None, "image_index": None, "image_mask": None}, grad_out)
    slots = "image_mask" if layout == "dense" else "image_index"
    inputs[slots] = torch.full_like(inputs[slots], False if layout == "dense" else -1)
    cases = [inputs]
    if layout == "pooled":
        cases.append({**inputs, "image_k": inputs["image_k"][:, :0], "image_v": inputs["image_v"][:, :0]})
    for case in cases:
        found = gradients(case, grad_out)
        assert_identical(text, found)
        assert not found["image_k"].any() and not found["image_v"].any()


def test_gradient_of_lse_where_nothing_is_seen(monkeypatch):
    problem = Problem(query_heads=2, kv_heads=1, num_images=0, biases=False, first_key="random")
    use_small_tiles(monkeypatch, problem)
    assert_unseen_gradient_of_lse_is_ignored("triton", problem)


@pytest.mark.parametrize("name", quick_or_slow(["dense", "pooled", "no images", "image_score_bias"], ["pooled"]))
def test_opcheck(monkeypatch, name):
    """Also of inputs of which none has a contiguous last dimension: outputs lie where the fake kernels say."""
    problem = replace(PROBLEMS[name], batch=1, query_heads=2, kv_heads=1, num_queries=2)
    use_small_tiles(monkeypatch, problem)
    for strided in (False, True):
        inputs = problem.inputs(torch.float32)
        for key, tensor in differentiable(inputs).items():
            laid_out = tensor.transpose(-1, 0).contiguous().transpose(-1, 0) if strided else tensor
            inputs[key] = laid_out.requires_grad_()
        torch.library.opcheck(forward_op, op_arguments(inputs, "triton", with_image_scores=name == "pooled"))


@pytest.mark.parametrize("layout", quick_or_slow(["dense", "pooled"], ["pooled"]))
def test_any_strides(monkeypatch, layout):
    problem = replace(PROBLEMS[layout], query_heads=2, kv_heads=1, num_queries=20)
    use_small_tiles(monkeypatch, problem)
    inputs = problem.inputs(torch.float32)
    row = torch.randn(16, generator=torch.Generator().manual_seed(0))
    plain = gradients(inputs, row.expand_as(inputs["q"]).contiguous())
    strided = inputs | {name: torch.stack([x, x], -1)[..., 0] for name, x in differentiable(inputs).items()}
    if layout == "pooled":
        strided["image_index"] = inputs["image_index"].int().transpose(0, 2).contiguous().transpose(0, 2)
    assert_identical(gradients(strided, row.expand_as(inputs["q"])), plain)


@pytest.mark.parametrize("layout", quick_or_slow(["dense", "pooled"], ["dense"]))
def test_rows_and_heads_beyond_32_bits(layout):
    inputs = BEYOND_32_BITS[layout].inputs(torch.float16)
    grad_out = torch.ones_like(inputs["q"])
    expected = gradients(inputs, grad_out)
    for name, far in far_apart({**inputs, "grad_out": grad_out}):
        found = gradients({**inputs, name: far}, grad_out) if name in inputs else gradients(inputs, far)
        assert_identical(found, expected)


@pytest.mark.parametrize("name", quick_or_slow(["dense", "pooled"], ["dense"]))
def test_image_score_bias_of_minus_infinity(monkeypatch, name):
    problem = replace(PROBLEMS[name], batch=1, num_queries=20)
    use_small_tiles(monkeypatch, problem)
    assert_minus_infinity_is_weight_zero("triton", problem)


@pytest.mark.parametrize("name", quick_or_slow(CACHES, ["cache_seqlens, decode"]))
def test_unused_keys_may_be_anything(monkeypatch, name):
    problem = made_small(CACHES[name])
    use_small_tiles(monkeypatch, problem)
    assert_unused_keys_may_be_anything("triton", problem)


@pytest.mark.parametrize("length", [pytest.param(-5, marks=pytest.mark.slow), 200])
def test_cache_seqlens_out_of_range_count_as_the_nearest(monkeypatch, length):
    """Not an error, as looking would wait for the device, and no access beyond the keys."""
    inputs, grad_out = prepared(monkeypatch, Problem(num_queries=4, prefix=33))
    nearest, beyond = (
        {**inputs, "cache_seqlens": torch.tensor([20, n], dtype=torch.int32)} for n in (min(max(length, 0), 37), length)
    )
    with guarded():
        assert_identical(gradients(beyond, grad_out), gradients(nearest, grad_out))


BIASES = ("image_k_bias", "image_v_bias", "image_logit_bias", "image_score_bias")


@pytest.mark.parametrize("bias", BIASES)
def test_each_bias_alone(monkeypatch, bias):
    """An absent bias is one of zeros, for the result and for every other gradient."""
    problem = Problem(batch=1, query_heads=2, kv_heads=1, num_queries=20, score_bias=True)
    inputs, grad_out = prepared(monkeypatch, problem)
    others = {*BIASES} - {bias}
    zeros = gradients({**inputs, **{name: torch.zeros_like(inputs[name]) for name in others}}, grad_out)
    alone = gradients({name: t for name, t in inputs.items() if name not in others}, grad_out)
    assert set(zeros) - set(alone) == others
    assert_identical(alone, zeros)
