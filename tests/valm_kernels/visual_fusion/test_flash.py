"""When flash attention takes the text of a CUDA call, and how PyTorch's operators are called, without a card."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.valm_kernels.visual_fusion.problems import Problem
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import api, crossover, flash
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import Inputs

GROUPED = Problem(query_heads=8, kv_heads=2, num_queries=16, head_dim=64, num_images=0, biases=False)
DOCUMENTS = replace(GROUPED, batch=1, num_queries=80, cu_seqlens=True)
ROWS = replace(DOCUMENTS, batch=3)


def checked(problem: Problem, dtype: torch.dtype = torch.float16, **options) -> Inputs:
    return api._with_documents(checked_inputs(**problem.inputs(dtype) | options))


@pytest.mark.parametrize("cudnn_keys", [None, 1])
@pytest.mark.parametrize(
    "problem", [GROUPED, replace(GROUPED, causal=False), replace(GROUPED, num_queries=1, prefix=15), DOCUMENTS, ROWS]
)
def test_operators_are_called_as_pytorch_declares_them(monkeypatch, problem, cudnn_keys):
    """On the meta device, whose operators check the arguments of those of CUDA."""
    monkeypatch.setattr(crossover, "MEASURED", {(0, 64): measured(cudnn_keys=cudnn_keys)})
    inputs = checked(problem)
    inputs = Inputs._make(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs)
    out, lse = flash.text_forward(inputs)
    assert out.shape == inputs.q.shape and out.dtype == torch.float16
    assert lse.shape == inputs.q.shape[:3] and lse.dtype == torch.float32
    gradients = flash.text_backward(torch.empty_like(out), out, lse, inputs)
    assert [g.shape for g in gradients] == [inputs.q.shape, inputs.k.shape, inputs.v.shape]


def check_bounds(bounds, key_bounds, max_q, max_k):
    """What CUDA's operators for documents require."""
    assert bounds is key_bounds and bounds.dtype == torch.int32 and bounds.is_contiguous()
    longest = int(bounds.diff().max())
    assert max_q == max_k >= longest
    return [slice(*pair) for pair in pairwise(bounds.tolist()) if pair[0] < pair[1]]


def packed_forward(q, k, v, bounds, key_bounds, max_q, max_k, dropout, causal, debug, scale):
    """Stands in for CUDA's operator: (T, H, D) and lse (H, T)."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for tokens in check_bounds(bounds, key_bounds, max_q, max_k):
        text = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
        part, part_lse = flash._cpu_flash(*text, dropout, causal, scale=scale)
        out[tokens], lse[:, tokens] = part[0].transpose(0, 1), part_lse[0]
    return out, lse, None, None, None


def packed_backward(
    grad_out, q, k, v, out, lse, bounds, key_bounds, max_q, max_k, dropout, causal, seed, offset, scale
):
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    for tokens in check_bounds(bounds, key_bounds, max_q, max_k):
        rows = (x[tokens].transpose(0, 1)[None] for x in (grad_out, q, k, v, out))
        parts = flash._cpu_flash_backward(*rows, lse[None, :, tokens], dropout, causal, scale=scale)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[tokens] = part[0].transpose(0, 1)
    return gradients


@pytest.mark.parametrize("problem", [DOCUMENTS, ROWS, replace(ROWS, tokens_first=False)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_documents_are_handed_over_as_cuda_takes_them(monkeypatch, problem, dtype):
    """With CUDA's operators replaced, the results are those of the CPU's for one document after the other."""
    inputs = checked(problem)
    assert inputs.cu_seqlens is not None
    inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(dtype))
    grad_out = torch.randn_like(inputs.q)

    def solve():
        results = flash.text_forward(inputs)
        return *results, *flash.text_backward(grad_out, *results, inputs)

    expected = solve()
    monkeypatch.setattr(flash, "_on_cpu", lambda _: False)
    monkeypatch.setattr(flash, "_packed_flash", packed_forward)
    monkeypatch.setattr(flash, "_packed_flash_backward", packed_backward)
    found = solve()
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    if problem.tokens_first:  # the rows are joined without a copy, and nothing need be copied afterwards
        assert all(flash._one_row(x).data_ptr() == x.data_ptr() for x in inputs[:3])
        assert found[0].stride() == inputs.q.stride()


def cudnn_forward(q, k, v, bias, with_lse, dropout, causal, debug, scale):
    """Stands in for CUDA's operator: lse (B, H, T, 1)."""
    assert bias is None and with_lse
    out, lse = flash._cpu_flash(q, k, v, dropout, causal, scale=scale)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None


def cudnn_backward(grad_out, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, scale):
    assert bias is cum_q is cum_k is None and (max_q, max_k) == (q.shape[2], k.shape[2])
    assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
    # PyTorch caches the backward by the strides of q, k and v
    assert grad_out.stride() == out.stride() == torch.empty_like(q).stride()
    return flash._cpu_flash_backward(grad_out, q, k, v, out, lse[..., 0], dropout, causal, scale=scale)


def read_with_cudnn(monkeypatch):
    """A stand-in for cuDNN's attention reads every text; what it does not support would raise, without a GPU."""
    entry = measured(cudnn_keys=1)
    monkeypatch.setattr(crossover, "MEASURED", {(0, head_dim): entry for head_dim in crossover.HEAD_DIMS})
    monkeypatch.setattr(flash, "_on_cpu", lambda _: False)
    monkeypatch.setattr(flash, "_cudnn", cudnn_forward)
    monkeypatch.setattr(flash, "_cudnn_backward", cudnn_backward)


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_cudnn_is_called_with_layouts_that_follow_from_q(monkeypatch, tokens_first, transposed):
    inputs = checked(replace(GROUPED, tokens_first=tokens_first))
    grad_out = torch.randn_like(inputs.q)
    if transposed:  # in memory, to (H, B, T, D)
        grad_out = grad_out.transpose(0, 1).contiguous().transpose(0, 1)

    def solve():
        out, lse = flash.text_forward(inputs)
        return out, lse, *flash.text_backward(grad_out, out, lse, inputs)

    expected = solve()
    read_with_cudnn(monkeypatch)
    assert all(a.equal(b) for a, b in zip(solve(), expected, strict=True))


@pytest.mark.parametrize(("given", "longest"), [(None, 80), (25, 25), (100, 80)])
def test_the_longest_document_limits_the_programs(given, longest):
    inputs = checked(ROWS, max_seqlen=given)
    assert flash._bounds(inputs)[2:] == (longest, longest)


ENTRY = {"capability": 90, "head_dim": 64, "keys": None, "cudnn_keys": None, "longest": 8192}
ENTRY |= {"device": "a card", "torch": str(torch.__version__), "triton": "any"}


def measured(keys=None, **fields):
    return ENTRY | {"keys": keys} | fields


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    """Also where a card has."""
    monkeypatch.setattr(crossover, "MEASURED", {})


def impl_for(monkeypatch, q_len, head_dim, dtype=torch.float16, **options):
    """The implementation that impl="auto" takes for CUDA tensors; "cudnn+triton" if cuDNN reads the text."""
    chosen = []

    def attention(inputs, impl, with_image_scores):
        chosen.append("cudnn+triton" if impl == flash.NAME and flash.uses_cudnn(inputs) else impl)
        return torch.empty_like(inputs.q), None, None

    monkeypatch.setattr(api, "fused_attention", attention)
    monkeypatch.setattr(api, "HAS_TRITON", True)
    with FakeTensorMode():
        q = torch.empty(options.pop("rows", 1), 2, q_len, head_dim, dtype=dtype, device="cuda")
        k = torch.empty(*q.shape[:2], options.pop("keys", q_len), head_dim, dtype=dtype, device="cuda")
        image = torch.empty(*q.shape[:3], 1, head_dim, dtype=dtype, device="cuda")
        image = None if options.pop("text_alone", False) else image
        if options.pop("windows", False):
            options["first_key"] = torch.zeros(1, q_len, dtype=torch.int32, device="cuda")
        if documents := options.pop("documents", None):
            options["cu_seqlens"] = torch.zeros(documents + 1, dtype=torch.int32, device="cuda")
        visual_fusion_attn(q, k, k, image, image, **options)
    return chosen[0]


def test_long_texts_on_cuda_take_flash_attention(monkeypatch):
    assert impl_for(monkeypatch, 2048, 128) == impl_for(monkeypatch, 4096, 64) == "flash+triton"
    assert impl_for(monkeypatch, 2047, 128) == impl_for(monkeypatch, 4095, 64) == "triton"
    assert impl_for(monkeypatch, 4096, 128, torch.float32) == "triton"
    assert impl_for(monkeypatch, 4096, 128, windows=True) == "triton"
    assert impl_for(monkeypatch, 8192, 128, documents=4) == "flash+triton"
    assert impl_for(monkeypatch, 8192, 128, documents=5) == "triton"  # short ones
    assert impl_for(monkeypatch, 8192, 128, documents=4, windows=True) == "triton"
    assert impl_for(monkeypatch, 4096, 128, rows=2, documents=4) == "flash+triton"
    assert impl_for(monkeypatch, 4096, 128, rows=2, documents=5) == "triton"
    assert impl_for(monkeypatch, 4096, 128, impl="triton") == "triton"
    assert impl_for(monkeypatch, 16, 64, impl="flash+triton") == "flash+triton"


def test_a_measured_length_takes_the_place_of_the_estimate_on_its_card_alone(monkeypatch):
    entries = {(90, 128): measured(1024), (90, 64): measured(), (80, 128): measured(1)}
    monkeypatch.setattr(crossover, "MEASURED", entries)
    monkeypatch.setattr(crossover, "capability", lambda device: 90)
    assert impl_for(monkeypatch, 1024, 128) == impl_for(monkeypatch, 1024, 96) == "flash+triton"
    assert impl_for(monkeypatch, 1023, 128) == impl_for(monkeypatch, 1023, 96) == "triton"
    assert impl_for(monkeypatch, 4096, 128, documents=4) == "flash+triton"
    assert impl_for(monkeypatch, 4096, 128, documents=5) == "triton"
    # not faster as far as was measured, and beyond it the estimate, which for this card is never
    assert impl_for(monkeypatch, 8192, 64) == impl_for(monkeypatch, 8193, 64) == "triton"
    # not measured: head dimensions above 128
    assert (impl_for(monkeypatch, 1024, 256), impl_for(monkeypatch, 1023, 256)) == ("flash+triton", "triton")
    monkeypatch.setattr(crossover, "MEASURED", {(86, 64): measured()})
    monkeypatch.setattr(crossover, "capability", lambda device: 86)
    assert (impl_for(monkeypatch, 2048, 128), impl_for(monkeypatch, 2047, 128)) == ("flash+triton", "triton")
    assert (impl_for(monkeypatch, 8192, 64), impl_for(monkeypatch, 8193, 64)) == ("triton", "flash+triton")


@pytest.mark.parametrize("capability", [90, 100])
def test_a_card_with_newer_products_is_not_sent_to_code_for_an_older_one(monkeypatch, capability):
    """PyTorch's own flash attention has code for 8.0 alone. FlashAttention-3 and -4 have code for these cards."""
    monkeypatch.setattr(crossover, "capability", lambda device: capability)
    assert impl_for(monkeypatch, 4096, 64) == impl_for(monkeypatch, 1 << 16, 128) == "triton"
    assert impl_for(monkeypatch, 1024, 256) == "flash+triton"
    assert impl_for(monkeypatch, 64, 64, text_alone=True) == "flash+triton"  # cuDNN's nowhere without a measurement
    newer = {90: "FA3", 100: "FA4"}[capability]
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: newer, raising=False)
    assert (impl_for(monkeypatch, 4096, 64), impl_for(monkeypatch, 4095, 64)) == ("flash+triton", "triton")


def test_cudnn_reads_what_it_supports_where_it_was_measured_to_be_faster(monkeypatch):
    entries = {
        (90, 64): measured(4096, cudnn_keys=1024),
        (90, 128): measured(2048),
        (90, 256): measured(9, cudnn_keys=1),
    }
    monkeypatch.setattr(crossover, "MEASURED", entries)
    monkeypatch.setattr(crossover, "capability", lambda device: 90)
    assert (impl_for(monkeypatch, 1024, 64), impl_for(monkeypatch, 1023, 64)) == ("cudnn+triton", "triton")
    assert (impl_for(monkeypatch, 2048, 64, text_alone=True)) == "cudnn+triton"
    assert impl_for(monkeypatch, 2048, 128) == "flash+triton"  # cuDNN was not faster
    # what cuDNN does not support
    assert impl_for(monkeypatch, 1024, 256) == "flash+triton"
    assert impl_for(monkeypatch, 1, 64, keys=8192, text_alone=True) == "flash+triton"
    assert impl_for(monkeypatch, 4096, 64, documents=1) == "flash+triton"
    assert impl_for(monkeypatch, 4095, 64, documents=1) == "triton"
    assert impl_for(monkeypatch, 4096, 64, torch.float32) == "triton"
    with monkeypatch.context() as activated:
        activated.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
        assert (impl_for(activated, 4096, 64), impl_for(activated, 4095, 64)) == ("flash+triton", "triton")
    monkeypatch.setattr(crossover, "capability", lambda device: 80)
    assert impl_for(monkeypatch, 4096, 64) == "flash+triton"  # another GPU


@pytest.fixture
def measured_file(tmp_path):
    path = tmp_path / "crossover.json"
    other_torch = measured(512, head_dim=128, cudnn_keys=512, torch="2.0.0")
    path.write_text(json.dumps([measured(cudnn_keys=1024), other_torch]))
    return path


def test_measured_lengths_are_read(measured_file):
    found = crossover.read_measured(measured_file)
    assert list(found) == [(90, 64), (90, 128)] and found[90, 64] == measured(cudnn_keys=1024)
    assert (found[90, 128]["keys"], found[90, 128]["cudnn_keys"]) == (512, None)  # its PyTorch has another cuDNN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "crossover.json must contain a list, as make gpu-check writes it, but contains an object of 0"),
        (["x"], "capability of entry 0 must be int, but is 'x'"),
        ([measured(1), ENTRY | {"keys": "4096"}], "keys of entry 1 must be int . None, but is '4096'"),
        ([measured(1, head_dim=65)], r"head_dim of entry 0 must be .*Literal\[64, 128, 256\], but is 65"),
        ([{"capability": 90}], "crossover.json: head_dim of entry 0 must be .* but is 'missing'"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, content, message):
    path = tmp_path / "crossover.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        crossover.read_measured(path)


@pytest.mark.slow  # it starts a process
def test_a_file_named_by_the_environment_takes_the_place_of_the_measured_lengths(measured_file):
    code = "from valm_kernels.visual_fusion import crossover; print(*crossover.MEASURED)"
    environment = os.environ | {"VALM_KERNELS_CROSSOVER": str(measured_file)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "(90, 64) (90, 128)\n"


def test_the_capability_is_that_of_the_card(monkeypatch):
    assert crossover.capability(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    assert crossover.capability(torch.device("cuda")) == 121
    monkeypatch.setattr(torch.version, "hip", "6.4")  # where (9, 4) is a card of AMD's
    assert crossover.capability(torch.device("cuda")) == 0


def test_torch_compile_asks_for_the_measured_length(monkeypatch):
    monkeypatch.setattr(crossover, "MEASURED", {(0, 64): measured(5, cudnn_keys=6)})

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(x):
        by_cudnn = crossover.is_long_for_cudnn(*x.shape, x.device)
        return x + crossover.is_long(x.shape[0], 1, x.shape[1], x.device) + by_cudnn

    assert [int(compiled(torch.zeros(keys, 16)).sum()) for keys in (4, 5, 6)] == [0, 80, 192]


def test_text_alone_on_cuda_takes_flash_attention_at_any_length(monkeypatch):
    assert impl_for(monkeypatch, 1, 64, text_alone=True) == "flash+triton"
    assert impl_for(monkeypatch, 16, 64, torch.float32, text_alone=True) == "triton"
    assert impl_for(monkeypatch, 16, 64, text_alone=True, windows=True) == "triton"
    assert impl_for(monkeypatch, 1, 64, keys=8192, text_alone=True) == "flash+triton"
    assert impl_for(monkeypatch, 2, 64, keys=8192, text_alone=True) == "triton"  # not as many queries as keys
    assert impl_for(monkeypatch, 1, 64, keys=8192) == "triton"
    assert impl_for(monkeypatch, 2, 64, keys=8192, causal=False) == "flash+triton"


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        (GROUPED, {"dtype": torch.float32}, "does not take float32"),
        (replace(GROUPED, head_dim=60), {}, "multiple of 8, not 60"),
        (replace(GROUPED, first_key="random"), {}, "does not take first_key, only documents as cu_seqlens"),
        (replace(DOCUMENTS, first_key="random"), {}, "does not take first_key, only documents as cu_seqlens"),
        (replace(GROUPED, seqlens=True), {}, "cache_seqlens"),
        (replace(GROUPED, softcap=2.0), {}, "softcap"),
        (replace(GROUPED, prefix=3), {}, "one query, or as many as keys, with causal=True, not 16 and 19"),
        (replace(DOCUMENTS, num_queries=1, prefix=7), {}, "as many queries as keys with cu_seqlens, not 1 and 8"),
    ],
)
def test_what_flash_attention_cannot_do_is_refused(monkeypatch, problem, options, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # CPU tensors are then accepted
    monkeypatch.setattr(api, "HAS_TRITON", True)
    assert message in flash.refusal(checked(problem, **options))
    with pytest.raises(ValueError, match=message):
        visual_fusion_attn(**problem.inputs(options.get("dtype", torch.float16)), impl="flash+triton")


@pytest.mark.parametrize(
    ("active", "capability", "head_dim", "chosen"),
    [
        ("FA3", (9, 0), 64, "flash+triton"),
        ("FA3", (9, 0), 256, "flash+triton"),
        ("FA3", (8, 0), 64, "triton"),
        ("FA4", (10, 0), 128, "flash+triton"),
        ("FA4", (10, 0), 136, "triton"),
        (None, (8, 0), 64, "flash+triton"),
        (None, (8, 0), 224, "flash+triton"),
        (None, (8, 9), 224, "triton"),
        (None, (12, 0), 200, "triton"),
        (None, (12, 0), 192, "flash+triton"),
    ],
)
def test_what_does_not_serve_the_device_is_not_chosen(monkeypatch, active, capability, head_dim, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active, raising=False)
    api._too_old.cache_clear()
    assert impl_for(monkeypatch, 4096, head_dim) == chosen
    if chosen == "triton":
        with pytest.raises(ValueError, match=f"does not support head dimension {head_dim} on cuda"):
            impl_for(monkeypatch, 4096, head_dim, impl="flash+triton")
    api._too_old.cache_clear()


@pytest.mark.parametrize(("capability", "head_dim", "served"), [(89, 208, False), (89, 192, True), (90, 208, True)])
def test_torch_compile_asks_whether_flash_attention_serves_the_device(monkeypatch, capability, head_dim, served):
    torch.compiler.reset()  # which takes what the last GPU answered for a constant
    monkeypatch.setattr(flash.crossover, "capability", torch.compiler.assume_constant_result(lambda device: capability))

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(x):
        return x + flash.serves(flash.active_implementation(), torch.device("cuda"), x.shape[0])

    assert bool(compiled(torch.zeros(head_dim))[0]) == served


def test_a_prefix_is_taken_without_a_causal_mask():
    assert flash.refusal(checked(replace(GROUPED, prefix=3, causal=False))) is None
    assert flash.refusal(checked(replace(GROUPED, num_queries=1, prefix=3))) is None  # which a single query needs not
