import inspect
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.valm_kernels.visual_fusion.problems import PROBLEMS, Problem, cotangents, differentiable, solve
from tests.valm_kernels.visual_fusion.test_checks import DENSE, ONE_ROW, POOLED, zeros
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import api
from valm_kernels.visual_fusion.inputs import TENSOR_NAMES


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", TENSOR_NAMES[:14])  # without cu_seqlens
def test_last_dimension_of_any_stride(name, impl):
    """Not an error: whatever the memory of an argument, the result is that of its values."""
    problem = POOLED if name == "image_index" else DENSE
    inputs = {"first_key": torch.tensor([[0, 3, 1, 2, 9]] * 2).int(), **problem.inputs(torch.float32)}
    inputs["image_q"] = inputs["q"].flip(2)
    inputs["cache_seqlens"] = torch.tensor([6, 7]).int()
    inputs["image_score_bias"] = torch.arange(30.0).view(2, 5, 3) / 10
    expected = visual_fusion_attn(**inputs, impl=impl)
    inputs[name] = torch.stack([inputs[name], torch.zeros_like(inputs[name])], -1)[..., 0]
    assert inputs[name].stride(-1) == 2
    assert visual_fusion_attn(**inputs, impl=impl).equal(expected)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"first_key": torch.tensor([[0, 3, 1, 2, 9]] * 2).int()}])
def test_rows_that_overlap(options):
    """Of tensors from `Tensor.unfold`: torch.empty_like makes one of them without contiguous rows."""
    inputs = Problem(num_queries=5, head_dim=16).inputs(torch.float32) | options
    overlapping = {
        "q": torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0)).unfold(2, 16, 1),
        "image_k": torch.randn(2, 2, 5, 18, generator=torch.Generator().manual_seed(1)).unfold(3, 16, 1),
    }
    assert torch.empty_like(overlapping["q"]).stride(-1) != 1
    contiguous = {name: tensor.contiguous() for name, tensor in overlapping.items()}
    expected, found = (
        solve(inputs | tensors, "cpu", (torch.ones(2, 4, 5, 16), None)) for tensors in (contiguous, overlapping)
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_cu_seqlens_of_any_stride(impl):
    inputs = ONE_ROW.inputs(torch.float32)
    bounds = torch.tensor([0, 4, 7])
    expected = visual_fusion_attn(**inputs, cu_seqlens=bounds, impl=impl)
    strided = torch.stack([bounds, bounds], -1)[:, 0]
    assert visual_fusion_attn(**inputs, cu_seqlens=strided, impl=impl).equal(expected)
    assert not visual_fusion_attn(**inputs, impl=impl).allclose(expected)


HERE, ON_META = zeros(1, 1, 2, 8), zeros(1, 1, 2, 8, device="meta")


@pytest.mark.parametrize(
    ("impl", "q", "interpret", "error", "message"),
    [
        ("flash", HERE, "0", ValueError, r"impl must be one of 'auto', .*'cpu', 'reference', got 'flash'"),
        ("cpu", ON_META, "0", ValueError, 'impl="cpu" needs CPU tensors, but q is on meta'),
        ("triton", HERE, "0", ValueError, 'impl="triton" needs CUDA tensors, but q is on cpu'),
        ("triton", HERE.double(), "1", TypeError, 'impl="triton" does not take float64'),
    ],
)
def test_what_an_implementation_does_not_serve(monkeypatch, impl, q, interpret, error, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(api, "HAS_TRITON", True)
    with pytest.raises(error, match=message):
        visual_fusion_attn(q, q, q, None, None, impl=impl)


class OnOtherDevice(torch.Tensor):
    device = torch.device("mps")


def test_auto_names_the_devices_that_it_serves():
    q = HERE.as_subclass(OnOtherDevice)
    with pytest.raises(ValueError, match='CPU, CUDA and meta tensors, but q is on mps; use impl="reference"'):
        visual_fusion_attn(q, q, q, None, None)


@pytest.mark.parametrize("name", ["dense", "image weights, pooled", "cache_seqlens", "cu_seqlens, rows"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_meta_tensors_get_the_shapes_of_results(name, impl):
    problem = PROBLEMS[name]
    expected = solve(problem.inputs(torch.bfloat16), impl, cotangents(problem))
    inputs = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in problem.inputs(torch.bfloat16).items()}
    found = solve(inputs, impl, cotangents(problem))
    layouts = [{n: (x.shape, x.dtype, x.stride()) for n, x in results.items()} for results in (found, expected)]
    assert layouts[0] == layouts[1] and all(x.is_meta for x in found.values())


def test_triton_has_to_be_installed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(api, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        visual_fusion_attn(HERE, HERE, HERE, None, None, impl="triton")


@pytest.mark.parametrize(
    ("capability", "hip", "measured", "message", "vendor"),
    [
        ((7, 5), None, True, "8.0 or newer .* but cuda:0 has 7.5", None),
        ((8, 0), None, True, None, None),
        ((8, 0), None, False, None, "NVIDIA"),
        ((7, 0), "6", True, None, "AMD"),
    ],
)
def test_old_gpus_and_gpus_that_ran_no_kernel_are_named(
    monkeypatch, tmp_path, capability, hip, measured, message, vendor
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(api, "MEASURED_TILES", tmp_path if measured else tmp_path / "measured_tiles.json")
    monkeypatch.setattr(api, "fused_attention", lambda inputs, impl, scores: (inputs.q, None, None))
    expected = nullcontext()
    if message:
        expected = pytest.raises(ValueError, match=message)
    elif vendor:
        expected = pytest.warns(UserWarning, match=f"for {vendor} GPUs, but have never run on an {vendor} GPU")
    caches = (api._too_old, api._warn_of_new_gpu)
    for cached in caches:
        cached.cache_clear()
    with FakeTensorMode(), expected, warnings.catch_warnings():
        if not vendor:
            warnings.simplefilter("error")
        q = torch.empty(1, 2, 4, 8, dtype=torch.float16, device="cuda")
        visual_fusion_attn(q, q, q, None, None)
    for cached in caches:
        cached.cache_clear()


def test_auto_is_the_cpu_implementation_for_cpu_tensors():
    inputs = POOLED.inputs(torch.float32)
    assert visual_fusion_attn(**inputs).equal(visual_fusion_attn(**inputs, impl="cpu"))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_every_way_to_have_no_images(impl):
    inputs = Problem(num_images=0, num_queries=5, biases=False).inputs(torch.float32)
    expected = visual_fusion_attn(**inputs, impl=impl)
    dense, pool = zeros(2, 2, 5, 0, 16), zeros(2, 7, 16)
    index, mask = zeros(2, 5, 0, dtype=torch.int64), zeros(2, 5, 0, dtype=torch.bool)
    for images in (
        {"image_k": dense, "image_v": dense},
        {"image_k": dense, "image_v": dense, "image_mask": mask},
        {"image_k": pool, "image_v": pool, "image_index": index},
        {"image_index": index},
        {"image_q": zeros(2, 4, 5, 16)},
        {"image_logit_bias": zeros(4), "image_k_bias": zeros(2, 16), "image_v_bias": zeros(2, 16)},
        {"image_score_bias": zeros(2, 5, 0)},
    ):
        assert visual_fusion_attn(**{**inputs, **images}, impl=impl).equal(expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("pool_size", [None, 6])
@pytest.mark.parametrize(("batch", "num_queries", "prefix"), [(0, 5, 2), (2, 0, 7), (2, 0, 0), (0, 0, 0)])
def test_no_queries(batch, num_queries, prefix, pool_size, impl):
    """As PyTorch's scaled_dot_product_attention: results are empty, and every gradient is there and 0."""
    problem = Problem(batch, 4, 2, num_queries, prefix, head_dim=8, pool_size=pool_size, score_bias=True, weights=True)
    inputs = problem.inputs(torch.float32) | {"cache_seqlens": torch.full((batch,), prefix).int()}
    found = solve(inputs, impl, cotangents(problem))
    shape = (batch, 4, num_queries)
    assert [found[name].shape for name in ("out", "lse", "image_weights")] == [(*shape, 8), shape, (*shape, 3)]
    for name, leaf in differentiable(inputs).items():
        assert found[name].equal(torch.zeros_like(leaf)), name
    bounds = torch.tensor([0] + [(row + 1) * (num_queries + prefix) for row in range(batch)])
    inputs |= {"cache_seqlens": None, "cu_seqlens": bounds}
    assert solve(inputs, impl, cotangents(problem))["out"].shape == (*shape, 8)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_slots_in_the_dense_layout(impl):
    """Every gradient is there, as DistributedDataParallel waits for it. PROBLEMS has the pooled layout."""
    problem = Problem(num_images=0, image_q=True, score_bias=True)
    inputs = problem.inputs(torch.float32) | {"image_k": zeros(2, 2, 40, 0, 16), "image_v": zeros(2, 2, 40, 0, 16)}
    found = solve(inputs, impl, cotangents(problem))
    for name in differentiable(inputs).keys() - {"q", "k", "v"}:
        assert found[name].equal(torch.zeros_like(inputs[name])), name


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_results_in_order(impl):
    inputs = DENSE.inputs(torch.bfloat16)
    out, lse, weights = visual_fusion_attn(**inputs, return_lse=True, return_image_weights=True, impl=impl)
    assert (out.shape, lse.shape, weights.shape) == ((2, 4, 5, 8), (2, 4, 5), (2, 4, 5, 3))
    assert (out.dtype, lse.dtype, weights.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    pair = visual_fusion_attn(**inputs, return_image_weights=True, impl=impl)
    assert pair[0].equal(out) and pair[1].equal(weights)
    assert visual_fusion_attn(**inputs, impl=impl).equal(out)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_image_weights_without_images(impl):
    inputs = Problem(num_images=0, num_queries=5, biases=False).inputs(torch.float32)
    inputs["q"].requires_grad_()
    _, weights = visual_fusion_attn(**inputs, return_image_weights=True, impl=impl)
    assert weights.shape == (2, 4, 5, 0)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("scale", [2**-60, 2**60])
@pytest.mark.parametrize("softcap", [None, 2**-60, 2**60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_ends_of_scale_and_softcap_results_are_finite(impl, scale, softcap, dtype):
    options = {"scale": scale, "softcap": softcap}
    results = solve(POOLED.inputs(dtype) | options, impl, (torch.ones(2, 4, 5, 8), None))
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_scale_defaults_to_inverse_root_of_head_dim(impl):
    inputs = DENSE.inputs(torch.float32)
    default = visual_fusion_attn(**inputs, impl=impl)
    assert default.equal(visual_fusion_attn(**inputs, scale=8**-0.5, impl=impl))
    assert not default.allclose(visual_fusion_attn(**inputs, scale=1, impl=impl))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype(impl, dtype):
    inputs = POOLED.inputs(torch.float32)
    inputs["image_q"] = inputs["q"].flip(2)
    inputs["k"] = inputs["k"].to(dtype)  # what a cached key looks like beside a float32 query
    inputs["image_logit_bias"].requires_grad_()
    inputs["q"].requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = visual_fusion_attn(**inputs, return_lse=True, impl=impl)
    assert out.dtype == dtype and lse.dtype == torch.float32
    cast = inputs | {name: inputs[name].to(dtype) for name in TENSOR_NAMES[:6]}
    assert out.equal(visual_fusion_attn(**cast, impl=impl))
    gradients = torch.autograd.grad(out.float().square().sum(), (inputs["q"], inputs["image_logit_bias"]))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_backward_under_autocast_is_as_exact(softcap):
    """The forward ran without it."""
    inputs = POOLED.inputs(torch.float32)
    inputs["q"].requires_grad_()
    gradients = []
    for autocast in (False, True):
        out = visual_fusion_attn(**inputs, softcap=softcap, impl="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            gradients += torch.autograd.grad(out.square().sum(), inputs["q"])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["q", "k", "v", "image_k", "image_v"])
def test_autocast_hides_no_wrong_dtype(name):
    inputs = DENSE.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.int32, *([] if name == "q" else [torch.float64])):
            with pytest.raises(TypeError, match=f"{name} must "):
                visual_fusion_attn(**{**inputs, name: inputs[name].to(dtype)})


def test_autocast_leaves_float64_alone():
    inputs = DENSE.inputs(torch.float64)
    expected = visual_fusion_attn(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert visual_fusion_attn(**inputs).equal(expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_float32_biases_beside_16_bit_tensors(impl):
    inputs = DENSE.inputs(torch.bfloat16)
    assert inputs["image_k_bias"].dtype == torch.float32
    narrow = {**inputs, "image_k_bias": inputs["image_k_bias"].bfloat16()}
    narrow["image_v_bias"] = inputs["image_v_bias"].bfloat16()
    assert visual_fusion_attn(**inputs, impl=impl).equal(visual_fusion_attn(**narrow, impl=impl))


def test_the_overloads_have_the_parameters_of_the_function():
    parameters = inspect.signature(visual_fusion_attn).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and "return_" not in p.name}
    hints = api.PackedOptions.__annotations__ | api.Options.__annotations__
    assert keywords == {name: hint.__forward_arg__ for name, hint in hints.items()}
