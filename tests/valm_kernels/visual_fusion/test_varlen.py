"""The packed layout: the results of each document alone, from tensors that are read where they lie."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.valm_kernels.visual_fusion.problems import Problem, assert_result_accurate, differentiable, gradients_of
from valm_kernels import visual_fusion_attn, visual_fusion_attn_varlen
from valm_kernels.visual_fusion import cpu, flash, op

BOUNDS = [0, 5, 5, 6, 29, 40]
PROBLEM = Problem(batch=1, pool_size=7, image_q=True, score_bias=True)
PROBLEMS = {
    "pooled": PROBLEM,
    "dense": replace(PROBLEM, pool_size=None, image_q=False),
    "by head": replace(PROBLEM, by_head=True, softcap=2.0),
    "no images": replace(PROBLEM, num_images=0, image_q=False, score_bias=False, biases=False),
}
HEADS_FIRST = ("q", "k", "v", "image_q")  # (1, H, T, D)
OF_TOKENS = ("image_index", "image_mask", "image_score_bias")  # (1, T, K), or (1, Hkv, T, K)
RESULTS = ("out", "lse", "image_weights")


def packed(inputs):
    """The arguments of visual_fusion_attn, or their gradients, as visual_fusion_attn_varlen has them."""
    given = dict(inputs)
    for name, x in inputs.items():
        if x is not None and name in HEADS_FIRST:
            given[name] = x[0].transpose(0, 1)
        elif x is not None and name in OF_TOKENS:
            given[name] = x[0]
        elif x is not None and name in ("image_k", "image_v") and x.dim() == 5:
            given[name] = x[0].permute(1, 2, 0, 3)
    return given


def document(inputs, start, stop):
    """Those tokens of the arguments of visual_fusion_attn."""
    found = dict(inputs)
    for name, x in inputs.items():
        if x is not None and (name in HEADS_FIRST or (name in ("image_k", "image_v") and x.dim() == 5)):
            found[name] = x[:, :, start:stop]
        elif x is not None and name in OF_TOKENS:
            found[name] = x[..., start:stop, :]
    return found


def leaves_of(given):
    return {name: tensor.detach().requires_grad_() for name, tensor in differentiable(given).items()}


def solve_packed(inputs, impl, grads):
    given = packed(inputs)
    leaves = leaves_of(given)
    options = {"cu_seqlens": torch.tensor(BOUNDS), "max_seqlen": 23, "return_lse": True, "return_image_weights": True}
    results = visual_fusion_attn_varlen(**given | leaves | options, impl=impl)
    return dict(zip(RESULTS, results, strict=True)) | gradients_of(results, grads, leaves)


def solve_alone(inputs, grads):
    """The same by the reference, from one document after the other in the layout of visual_fusion_attn."""
    leaves = leaves_of(inputs)
    documents = [document(inputs | leaves, *bounds) for bounds in pairwise(BOUNDS) if bounds[0] < bounds[1]]
    options = {"return_lse": True, "return_image_weights": True, "impl": "reference"}
    parts = [visual_fusion_attn(**of_document, **options) for of_document in documents]
    out, lse, weights = (torch.cat(results, 2)[0] for results in zip(*parts, strict=True))
    results = (out.transpose(0, 1), lse, weights)
    return dict(zip(RESULTS, results, strict=True)) | packed(gradients_of(results, grads, leaves))


def assert_packs(impl, problem, dtype, with_lse=True):
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(problem.num_queries, problem.query_heads, problem.head_dim, generator=generator) + 1
    grad_lse = torch.randn(problem.query_heads, problem.num_queries, generator=generator)
    grads = (grad_out.bfloat16().half(), grad_lse if with_lse else None, None)
    truth = solve_alone(problem.inputs(torch.float64), grads)
    eager = solve_alone(problem.inputs(dtype), grads)
    actual = solve_packed(problem.inputs(dtype), impl, grads)
    assert actual.keys() == truth.keys()
    for name, tensor in actual.items():
        assert_result_accurate(name, tensor.detach(), eager[name].detach(), truth[name].detach(), dtype)
    for name in ("out", "lse", "q", "k", "v"):
        assert actual[name].is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_each_document_has_the_results_that_it_has_alone(name, dtype):
    assert_packs("cpu", PROBLEMS[name], dtype)


def packed_tensors():
    problem = replace(PROBLEM, num_queries=64, score_bias=False)
    given = packed(problem.inputs(torch.bfloat16)) | {"cu_seqlens": torch.tensor([0, 20, 64]).int()}
    return given | {"image_index": given["image_index"].int()}


def addresses(tensor):
    first = tensor.data_ptr()
    return range(first, first + tensor.untyped_storage().nbytes())


def test_the_cpu_reads_tensors_where_they_lie(monkeypatch):
    given, seen = packed_tensors(), []
    attend, read = cpu._flash, cpu._ImageBranch.__init__
    monkeypatch.setattr(cpu, "_flash", lambda *args, **options: seen.append(args[:3]) or attend(*args, **options))

    def init(branch, inputs):
        read(branch, inputs)
        images.update(branch.inputs)

    images = {}
    monkeypatch.setattr(cpu._ImageBranch, "__init__", init)
    visual_fusion_attn_varlen(**given)
    assert len(seen) == 2  # documents
    for of_document in seen:
        for name, tensor in zip("qkv", of_document, strict=True):
            assert tensor.data_ptr() in addresses(given[name]), name
    for name in ("image_q", "image_k", "image_v", "image_index"):
        assert images[name.replace("image_q", "q")].data_ptr() == given[name].data_ptr(), name


def test_one_document_copies_nothing_on_the_cpu():
    given = packed_tensors() | {"cu_seqlens": torch.tensor([0, 64])}
    biases = {name: x.float() for name, x in given.items() if name.endswith("bias")}
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        visual_fusion_attn_varlen(**given | biases)
    copied = [event.input_shapes[0] for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
    assert not [shape for shape in copied if torch.Size(shape).numel() >= given["k"].numel()]


def test_triton_and_flash_read_tensors_where_they_lie(monkeypatch):
    launch = pytest.importorskip("valm_kernels.visual_fusion.triton.launch")
    given, seen = packed_tensors(), []

    def forward(inputs, image_scores):
        seen.append(inputs)
        return inputs.q, inputs.q[..., 0].float()

    monkeypatch.setattr(op, "_implementation", lambda impl: (forward, None))
    with torch.no_grad():
        visual_fusion_attn_varlen(**given)
    for name, before, after in zip(seen[0]._fields, seen[0], launch.kernel_inputs(seen[0]), strict=True):
        assert after is before, name
    for name in "qkv":
        row = flash._one_row(getattr(seen[0], name)).transpose(0, 1)
        assert row.data_ptr() == given[name].data_ptr() and row.is_contiguous() and row.shape == given[name].shape


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": torch.zeros(1, 4, 6, 8)}, ValueError, r"q must have 3 dimensions \(T, Hq, D\), got shape \(1, 4,"),
        ({"v": torch.zeros(6, 8)}, ValueError, r"v must have 3 dimensions \(T, Hkv, D\), got shape \(6, 8\)"),
        ({"image_q": torch.zeros(6, 8)}, ValueError, r"image_q must have 3 dimensions \(T, Hq, D\)"),
        ({"k": None}, TypeError, "k must be a tensor, got None"),
        ({"k": torch.zeros(7, 2, 8)}, ValueError, "k must have the 6 tokens of q"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a tensor, got None"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must begin with 0 and end with 6"),
        ({"causal": False}, ValueError, "cu_seqlens needs causal=True"),
        ({"dropout": 0.1}, TypeError, "unexpected keyword argument 'dropout'"),
    ],
)
def test_wrong_arguments_raise(wrong, error, message):
    text = {"q": torch.zeros(6, 4, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8)}
    given = text | {"image_k": None, "image_v": None, "cu_seqlens": torch.tensor([0, 6])}
    with pytest.raises(error, match=message):
        visual_fusion_attn_varlen(**given | wrong)
