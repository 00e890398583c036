import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.optional_hypothesis import given, settings, st
from tests.valm_kernels.guard_pages import guarded, needs_guard_pages
from tests.valm_kernels.visual_fusion.problems import (
    CACHES,
    PROBLEMS,
    Problem,
    assert_identical,
    assert_masked_images_may_be_anything,
    assert_minus_infinity_is_weight_zero,
    assert_passes_nan_on,
    assert_result_accurate,
    assert_solves,
    assert_unseen_gradient_of_lse_is_ignored,
    assert_unused_keys_may_be_anything,
    cotangents,
    differentiable,
    solve,
)
from valm_kernels import visual_fusion_attn
from valm_kernels.native import native
from valm_kernels.visual_fusion import cpu
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.cpu import text_segments
from valm_kernels.visual_fusion.inputs import Gradients
from valm_kernels.visual_fusion.reference import text_visible

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_float64_reference(name, dtype):
    assert_solves("cpu", PROBLEMS[name], dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("dense", "pooled", "odd head", "head of 64", "head of 64, pooled", "heads first", "softcap"),
        *("image_score_bias", "image_score_bias, pooled", "image weights, pooled"),
    ],
)
@pytest.mark.parametrize("isa", native().cpu_isas())
def test_every_instruction_set(isa, name, dtype, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    if dtype == torch.float64:
        assert_is_the_reference(PROBLEMS[name].inputs(), cotangents(PROBLEMS[name]))
    else:
        assert_solves("cpu", PROBLEMS[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense", "pooled", "softcap", "image weights, pooled", "one image"])
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("isa", native().cpu_isas())
def test_where_images_have_all_of_the_weight(isa, with_lse, name, dtype, monkeypatch):
    """Then the rounding of `out` does not reach the gradients, which may be 0 in truth."""
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    problem = replace(Problem(pool_size=1) if name == "one image" else PROBLEMS[name], gaps=False)
    grads = cotangents(problem, with_lse)

    def solved(impl, dtype):
        inputs = problem.inputs(dtype)
        inputs["image_logit_bias"] += 30  # text and images are at most about 10 apart
        return solve(inputs, impl, grads)

    truth, eager, actual = solved("reference", torch.float64), solved("reference", dtype), solved("cpu", dtype)
    for result, tensor in actual.items():
        assert_result_accurate(result, tensor, eager[result], truth[result], dtype)


@needs_guard_pages
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "pooled", "odd head", "head of 64", "image_score_bias"])
@pytest.mark.parametrize("isa", native().cpu_isas())
def test_nothing_is_read_beside_a_tensor(isa, name, dtype, side, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    inputs = PROBLEMS[name].inputs(dtype)
    tensors = {given: x.contiguous() for given, x in inputs.items() if isinstance(x, torch.Tensor)}
    beside = {given: guarded(x, side) for given, x in tensors.items()}
    grads = cotangents(PROBLEMS[name])
    assert_identical(solve(inputs | beside, "cpu", grads), solve(inputs | tensors, "cpu", grads))


def assert_is_the_reference(inputs, grads):
    """In float64 both differ by the order of their sums only: by a few hundred units in the last place, and by more
    where the sum over all tokens, the gradient of a bias, nearly cancels."""
    truth = solve(inputs, "reference", grads)
    for name, tensor in solve(inputs, "cpu", grads).items():
        finite = truth[name].isfinite()
        assert tensor[~finite].equal(truth[name][~finite]), name
        if finite.any():
            error = (tensor - truth[name])[finite].abs().max() / truth[name][finite].abs().max().clamp(min=1e-3)
            assert error < (1e-12 if name.endswith("bias") else 1e-13), f"{name}: {error:.1e}"


@pytest.mark.parametrize("isa", native().cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_numbers_are_read_and_rounded_as_pytorch_does(dtype, isa, monkeypatch):
    """With one image and hardly any text, out is the image's value plus a float32 bias: the reading and the rounding
    of every 16-bit number can be seen."""
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = numbers[numbers.isfinite()]
    values = torch.cat([values, values.new_zeros(-len(values) % 64)]).view(1, 1, -1, 1, 64)  # (B, H, T, K, D)
    token = values.new_zeros(1, 1, values.shape[2], 64)
    opened = torch.tensor([200.0])  # an image score so high that the text's weight is 0
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 64, generator=generator) * 2.0 ** torch.randint(-24, 10, (1, 64), generator=generator)
    given = (token, token, token, torch.zeros_like(values), values)
    for image_v_bias, expected in ((None, values), (bias, (values.float() + bias).to(dtype))):
        out = visual_fusion_attn(*given, image_logit_bias=opened, image_v_bias=image_v_bias, impl="cpu")
        assert out.equal(expected.squeeze(3))


@pytest.mark.parametrize(
    "name", ["dense", "pooled", "prefix", "documents", "random first_key", "softcap, prefix", "image weights"]
)
def test_unused_lse(name):
    assert_solves("cpu", PROBLEMS[name], torch.float32, with_lse=False)


SMALL = Problem(num_queries=5, head_dim=8, num_images=2)
SMALL_POOLED = replace(SMALL, num_queries=4, pool_size=3)
GRADCHECKED = {
    "dense": SMALL,
    "pooled": replace(SMALL_POOLED, prefix=2),
    "random first_key": replace(SMALL_POOLED, num_queries=6, first_key="random"),
    "no images": Problem(num_queries=5, head_dim=9, num_images=0, first_key="left_padding"),
    "softcap and image_q": replace(SMALL, softcap=1.5, image_q=True),
    "softcap, pooled": replace(SMALL_POOLED, prefix=2, softcap=1.5, first_key="random"),
    "image_score_bias": replace(SMALL, score_bias=True),
    "cache_seqlens": replace(SMALL, batch=3, num_queries=4, prefix=3, seqlens=True),
    "image_score_bias, softcap, image_q, pooled": replace(SMALL_POOLED, softcap=1.5, image_q=True, score_bias=True),
    "by head": replace(SMALL_POOLED, by_head=True, prefix=2),
}


@pytest.mark.parametrize("name", GRADCHECKED)
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck(name, fast_mode):
    """Along a random direction; every night in each."""
    inputs = GRADCHECKED[name].inputs(torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in differentiable(inputs).items()}

    def function(*tensors):
        given = inputs | dict(zip(leaves, tensors, strict=True))
        out, lse, weights = visual_fusion_attn(**given, impl="cpu", return_lse=True, return_image_weights=True)
        return out, lse.masked_fill(lse == -torch.inf, 0), weights

    assert torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=fast_mode)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    num_queries=st.integers(1, 70),
    prefix=st.integers(0, 40),
    head_dim=st.integers(8, 72),
    num_images=st.integers(0, 9),
    pool_size=st.none() | st.integers(1, 20),
    first_key=st.sampled_from([None, "documents", "left_padding", "sliding_window", "random"]),
    seqlens=st.booleans(),
    causal=st.booleans(),
    softcap=st.none() | st.floats(0.3, 60),
    image_q=st.booleans(),
    score_bias=st.booleans(),
    weights=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_stride(data, **sizes):
    sizes["query_heads"] = sizes["kv_heads"] * sizes.pop("group")
    problem = Problem(**sizes)
    inputs = problem.inputs(torch.float64)
    for name in ("q", "k", "v", "image_k", "image_v", "image_q", "image_index", "image_mask", "image_score_bias"):
        if inputs.get(name) is not None:
            inputs[name] = restride(inputs[name], data.draw(st.permutations(range(inputs[name].dim()))))
    assert_is_the_reference(inputs, cotangents(problem))


def restride(tensor, order):
    """The same values in memory whose dimensions are ordered by `order`, every second element of it."""
    moved = tensor.permute(*order)
    memory = torch.zeros(*moved.shape, 2, dtype=tensor.dtype)
    memory[..., 0] = moved
    inverse = sorted(range(len(order)), key=lambda i: order[i])
    return memory[..., 0].permute(*inverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "pooled", "documents", "image_score_bias", "image weights, pooled"])
def test_same_bits_every_time_and_for_any_thread_count(name, dtype):
    problem = PROBLEMS[name]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(solve(problem.inputs(dtype), "cpu", cotangents(problem)))
        finally:
            torch.set_num_threads(threads)
    first, again, *others = results
    assert_identical(again, first)
    for other in others:  # the flash kernel's own dq, dk and dv may add in another order
        assert_identical({name: x for name, x in other.items() if name not in ("q", "k", "v")}, first)


@pytest.mark.slow  # it starts processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("other_runtime", [None, "faiss"])
def test_after_fork(other_runtime):
    """In a child that forked after the parent's threads ran, also where faiss brought an OpenMP runtime of its own."""
    if other_runtime:
        pytest.importorskip(other_runtime)
    code = f"from {__name__} import fork_and_compare; fork_and_compare({other_runtime!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def fork_and_compare(other_runtime):
    if other_runtime == "faiss":
        import faiss
        import numpy

        index = faiss.IndexFlatIP(64)
        index.add(numpy.ones((20_000, 64), dtype="float32"))
        index.search(numpy.ones((300, 64), dtype="float32"), 4)
    torch.set_num_threads(2)
    problem = PROBLEMS["pooled"]
    expected = solve(problem.inputs(torch.float32), "cpu", cotangents(problem))["image_k"]
    child = os.fork()
    if child == 0:
        # The backward without autograd, whose threads do not survive a fork.
        same = fused_image_gradient(problem).equal(expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def fused_image_gradient(problem):
    inputs = checked_inputs(**problem.inputs(torch.float32))
    grad_out, grad_lse = (g.float() for g in cotangents(problem))
    needed = [True] * len(Gradients._fields)
    return cpu.backward(grad_out, grad_lse, None, *cpu.forward(inputs), inputs, needed).image_k


@pytest.mark.parametrize("name", ["dense", "pooled"])
def test_image_gradients_that_nobody_needs(name, monkeypatch):
    """Are neither written nor given memory; the others are the same."""
    calls, run = [], cpu._ImageBranch.run
    monkeypatch.setattr(cpu._ImageBranch, "run", lambda *args, **given: calls.append(given) or run(*args, **given))
    inputs, others = PROBLEMS[name].inputs(torch.float32), ("q", "image_k_bias", "image_logit_bias")

    def gradients(*needed: str) -> list[torch.Tensor]:
        leaves = {name: inputs[name].clone().requires_grad_() for name in needed}
        return torch.autograd.grad(visual_fusion_attn(**inputs | leaves, impl="cpu").sum(), list(leaves.values()))

    *expected, image_v = gradients(*others, "image_v")
    assert image_v.any() and calls[-1]["grad_image_k"] is not None
    found = gradients(*others)
    assert calls[-1]["grad_image_k"] is None and calls[-1]["grad_image_v"] is None
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))


def test_query_that_sees_nothing():
    problem = Problem(num_queries=10, pool_size=4, batch=1)
    inputs = problem.inputs(torch.float32)
    inputs["first_key"] = torch.zeros(1, 10, dtype=torch.int32)
    inputs["first_key"][0, 2:4] = 10
    inputs["image_index"][0, 2:4] = -1
    results = solve(inputs, "cpu", cotangents(problem))
    assert (results["out"][:, :, 2:4] == 0).all()
    assert (results["lse"][:, :, 2:4] == -torch.inf).all()
    assert (results["q"][:, :, 2:4] == 0).all()
    assert all(not tensor.isnan().any() for tensor in results.values())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("first_key", ["left_padding", "random"])
def test_gradient_of_lse_where_nothing_is_seen(impl, first_key):
    problem = Problem(num_queries=40, num_images=0, biases=False, first_key=first_key)
    assert_unseen_gradient_of_lse_is_ignored(impl, problem)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("isa", native().cpu_isas())
@pytest.mark.parametrize("name", ["q", "image_k", "image_v"])
def test_nan_is_passed_on(name, isa, dtype, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    assert_passes_nan_on("cpu", name, dtype)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_masked_images_may_be_anything(impl):
    assert_masked_images_may_be_anything(impl)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", CACHES)
def test_unused_keys_may_be_anything(name, impl):
    assert_unused_keys_may_be_anything(impl, CACHES[name])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["dense", "pooled", "by head", "random first_key"])
def test_image_score_bias_of_minus_infinity(name, impl):
    assert_minus_infinity_is_weight_zero(impl, PROBLEMS[name])


def test_empty_pool():
    problem = Problem(pool_size=1)
    inputs, grads = problem.inputs(torch.float32), cotangents(problem)
    inputs["image_index"].fill_(-1)
    full = solve(inputs, "cpu", grads)
    empty = solve(inputs | {name: inputs[name][:, :0] for name in ("image_k", "image_v")}, "cpu", grads)
    assert_identical({name: full[name] for name in ("out", "lse", "q", "k", "v")}, empty)
    assert empty["image_k"].shape == (2, 0, 16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 50])
@pytest.mark.parametrize("first_key", [None, "documents", "left_padding", "sliding_window", "random"])
@pytest.mark.parametrize("num_queries", [150, 3])
def test_text_segments_cover_each_visible_pair_once(num_queries, first_key, prefix, causal):
    problem = Problem(batch=3, num_queries=num_queries, prefix=prefix, first_key=first_key)
    first = problem.inputs().get("first_key")
    seen = torch.zeros(problem.batch, problem.num_queries, problem.num_keys, dtype=torch.int32)
    covered = torch.zeros(problem.batch, problem.num_queries, dtype=torch.bool)
    for segment in text_segments(problem.batch, problem.num_queries, problem.num_keys, first, causal):
        queries, keys = (s.stop - s.start for s in (segment.queries, segment.keys))
        assert queries > 0 and keys > 0
        visible = torch.ones(queries, keys, dtype=torch.bool)
        if segment.causal:
            assert queries == keys
            visible = visible.tril()
        if segment.visible is not None:
            visible = segment.visible[:, 0]
        seen[segment.rows, segment.queries, segment.keys] += visible.int()
        assert (covered[segment.rows, segment.queries] == segment.joins).all()
        covered[segment.rows, segment.queries] = True
    expected = text_visible(problem.num_queries, problem.num_keys, first, None, causal, torch.device("cpu"))
    assert seen.equal(expected[:, 0].expand_as(seen).int())


def test_documents_and_padding_need_no_mask():
    length = 256
    documents = (torch.arange(length) // 64 * 64).int()
    padding = torch.full((length,), 100, dtype=torch.int32)
    for first_key, calls in ((documents, 4), (padding, 1)):
        segments = list(text_segments(2, length, length, first_key.expand(2, -1), True))
        assert len(segments) == calls
        assert all(s.visible is None and s.causal and s.rows == slice(0, 2) for s in segments)


def test_a_token_of_each_row_is_one_call():
    first_key = torch.tensor([[5], [0], [90], [5]], dtype=torch.int32)
    (segment,) = text_segments(4, 1, 100, first_key, True)
    assert segment.keys == slice(0, 100) and segment.visible.sum((1, 2, 3)).tolist() == [95, 100, 10, 95]


def test_sliding_window_reads_only_its_keys():
    length, window = 1024, 64
    first_key = (torch.arange(length) - window + 1).clamp(min=0).int()[None]
    pairs = sum(
        (s.queries.stop - s.queries.start) * (s.keys.stop - s.keys.start)
        for s in text_segments(1, length, length, first_key, True)
    )
    assert pairs < 4 * length * window


@pytest.mark.parametrize("size", [1.0, 7e4, 1e7])
def test_a_large_gradient_of_lse_in_float16(size):
    """A scaler of losses begins at 2^16; float16 ends there. Scores are small, so that the gradients of q and k fit."""
    tensors = torch.randn(3, 1, 2, 40, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float16, "cpu")):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors.half())
        _, lse = visual_fusion_attn(q, k, v, None, None, scale=1e-4, return_lse=True, impl=impl)
        found.append(torch.autograd.grad(lse, (q, k), torch.full_like(lse, size)))
    for expected, gradient in zip(*found, strict=True):
        assert (gradient - expected).abs().max() <= 2e-3 * expected.abs().max()
