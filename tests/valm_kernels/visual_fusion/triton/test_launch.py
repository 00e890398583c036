"""What the launchers ask of the device, with a PyTorch that says it is another's."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

from valm_kernels.visual_fusion.triton import backward_query
from valm_kernels.visual_fusion.triton.launch import architecture, kernel_constants

CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_device_is_known():
    architecture.cache_clear()
    yield
    architecture.cache_clear()


def test_architecture_of_an_nvidia_card(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert architecture(CARD) == 90
    assert architecture(torch.device("cpu")) == 80


def test_architecture_of_an_amd_card_is_its_name(monkeypatch):
    """ROCm has a capability too, (9, 4), which is none of CUDA's."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert architecture(CARD) == "gfx942"


def test_products_of_float32_on_amd_are_of_float32(monkeypatch):
    """Triton has no tf32x3 there."""
    x = torch.empty(1, 1, 1, 64)
    precision = {}
    for arch in (90, "gfx942"):
        monkeypatch.setattr("valm_kernels.visual_fusion.triton.launch.architecture", lambda _, arch=arch: arch)
        precision[arch] = kernel_constants(x, x, causal=True)["INPUT_PRECISION"]
    assert precision == {90: "tf32x3", "gfx942": "ieee"}
    half = x.half()
    assert kernel_constants(half, half, causal=True)["INPUT_PRECISION"] == "ieee"


def test_partial_sums_are_rounded_once():
    gradient = torch.empty(3, dtype=torch.bfloat16)
    backward_query._sum_into(gradient, torch.full((1000, 3), 1.003))
    assert gradient.tolist() == [1004] * 3
