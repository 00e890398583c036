"""The Triton kernels on a card, with the tiles they are meant to have: `make gpu-check` and `make ttsem-check`."""

import sys

import pytest
import torch

from tests.valm_kernels.visual_fusion.problems import PROBLEMS, Problem, assert_solves, cotangents, solve
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import flash

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# ttsem replaces the launches of Triton alone.
NEEDS_DRIVER = pytest.mark.xfail(
    "ttsem" in sys.modules, reason="ttsem has no CUDA driver", raises=RuntimeError, strict=True
)

LARGE = {
    "dense": Problem(query_heads=3, kv_heads=3, num_queries=1000, head_dim=64, num_images=8),
    "pooled": Problem(query_heads=3, kv_heads=3, num_queries=1000, head_dim=64, num_images=8, pool_size=700),
    "grouped": Problem(query_heads=8, kv_heads=2, num_queries=700, prefix=77, head_dim=128, pool_size=300),
    "group of six": Problem(query_heads=6, kv_heads=1, num_queries=400, head_dim=96),
    "documents": Problem(num_queries=1024, head_dim=64, first_key="documents", pool_size=50),
    "widest": Problem(num_queries=300, head_dim=256, num_images=4),
    "softcap": Problem(num_queries=500, head_dim=64, num_images=4, softcap=2.0),
    "wide softcap": Problem(num_queries=400, head_dim=128, num_images=4, softcap=2.0),
    "widest softcap": Problem(num_queries=300, head_dim=256, num_images=4, softcap=2.0),
    "widest decode": Problem(num_queries=1, prefix=3000, head_dim=256, num_images=4),
    "decode": Problem(num_queries=1, prefix=5000, head_dim=64, num_images=4),
    "decode grouped": Problem(query_heads=8, kv_heads=1, num_queries=2, prefix=3000, head_dim=128, pool_size=9),
    "packed": Problem(query_heads=4, kv_heads=2, cu_seqlens=True, batch=3, num_queries=400, head_dim=64, pool_size=50),
    "packed, no images": Problem(cu_seqlens=True, batch=1, num_queries=700, head_dim=128, num_images=0),
}
# Those that flash attention takes.
WITH_FLASH = ["dense", "pooled", "group of six", "widest", "packed", "packed, no images"]


def on_card(problem, dtype):
    inputs = problem.inputs(dtype)
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_float64_reference(name, dtype):
    assert_solves("triton", PROBLEMS[name], dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_agrees_on_large_problems(name, dtype):
    assert_solves("triton", LARGE[name], dtype, device="cuda")


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", WITH_FLASH)
def test_agrees_with_flash_attention_for_the_text(monkeypatch, name, dtype, with_lse):
    """Its backward too, where no gradient of lse is asked for: one that is deterministic would be another."""
    calls = []
    text_backward = flash.text_backward
    monkeypatch.setattr(flash, "text_backward", lambda *tensors: calls.append(1) or text_backward(*tensors))
    torch.set_deterministic_debug_mode("default")
    assert_solves("flash+triton", LARGE[name], dtype, with_lse, device="cuda")
    assert bool(calls) == (not with_lse)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["dense", "pooled", "group of six"])
def test_agrees_with_cudnn_for_the_text(monkeypatch, name, dtype):
    monkeypatch.setattr(flash, "uses_cudnn", lambda inputs: True)
    torch.set_deterministic_debug_mode("default")
    assert_solves("flash+triton", LARGE[name], dtype, with_lse=False, device="cuda")


@pytest.mark.parametrize("name", ["dense", "pooled", "decode"])
def test_every_run_gives_the_same_bits(name):
    grads = cotangents(LARGE[name])
    first, second = (solve(on_card(LARGE[name], torch.bfloat16), "triton", grads) for _ in range(2))
    for result, tensor in first.items():
        assert torch.equal(tensor, second[result]), result


@NEEDS_DRIVER
@pytest.mark.parametrize("name", ["dense", "pooled", "decode"])
def test_host_never_waits_and_a_graph_replays(name):
    """Forward and backward are captured in a CUDA graph, and replaying it on other values gives their result."""
    inputs = on_card(LARGE[name], torch.bfloat16)
    grads = tuple(g.cuda() for g in cotangents(LARGE[name]))
    torch.use_deterministic_algorithms(False)  # filling fresh memory would be captured too
    expected = solve(inputs, "triton", grads)
    q = inputs["q"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solve({**inputs, "q": q}, "triton", grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    q.zero_()
    with torch.cuda.graph(graph):
        captured = solve({**inputs, "q": q}, "triton", grads)
    q.copy_(inputs["q"])
    graph.replay()
    for result, tensor in expected.items():
        assert torch.equal(captured[result], tensor), result


@NEEDS_DRIVER
@pytest.mark.parametrize("name", ["dense", "pooled"])
def test_compiles_without_a_graph_break(name):
    inputs = on_card(LARGE[name], torch.bfloat16)
    grads = cotangents(LARGE[name])

    def loss(q):
        out, lse = visual_fusion_attn(**{**inputs, "q": q}, impl="triton", return_lse=True)
        return (out * grads[0].to(out)).sum() + (lse * grads[1].to(lse)).sum()

    eager, compiled = (inputs["q"].clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert torch.equal(compiled.grad, eager.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("impl", ["triton", flash.NAME])
@pytest.mark.parametrize("name", ["pooled", "dense"])
def test_runs_on_a_device_that_is_not_the_current_one(name, impl):
    assert torch.cuda.current_device() == 0
    assert_solves(impl, LARGE[name], torch.bfloat16, with_lse=impl == "triton", device="cuda:1")
    assert torch.cuda.current_device() == 0
