"""The forward kernels under Triton's interpreter; test_triton_interpreted.py starts the process."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreted.py with TRITON_INTERPRET=1", allow_module_level=True)

from tests.tolerance import assert_accurate
from tests.valm_kernels.visual_fusion.problems import PROBLEMS
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import triton_forward
from valm_kernels.visual_fusion.triton_tiles import Tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that small problems cross their borders, and so short a split that decoding splits."""
    monkeypatch.setattr(triton_forward, "tiles_for", lambda *_: Tiles(32, 32, 4, 2))
    monkeypatch.setattr(triton_forward, "multiprocessors", lambda _: 8)
    monkeypatch.setattr(triton_forward, "MIN_KEYS_PER_SPLIT", 32)


def assert_forward_accurate(problem, dtype):
    def attend(impl, dtype):
        with torch.no_grad():
            return visual_fusion_attn(**problem.inputs(dtype), impl=impl, return_lse=True)

    results = zip(attend("triton", dtype), attend("reference", dtype), attend("reference", torch.float64), strict=True)
    for name, (actual, eager, truth) in zip(("out", "lse"), results, strict=True):
        assert actual.dtype == eager.dtype
        assert_accurate(name, actual, eager, truth)


@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_float64_reference(name):
    assert_forward_accurate(PROBLEMS[name], torch.float32)


# The interpreter computes bfloat16 products wrongly; bfloat16 shares the kernels.
@pytest.mark.parametrize("name", ["dense", "pooled", "no images", "decode", "odd head", "documents"])
def test_agrees_in_float16(name):
    assert_forward_accurate(PROBLEMS[name], torch.float16)


@pytest.mark.parametrize("name", ["decode", "left padding decode", "random first_key with prefix"])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_split_keys(monkeypatch, name, splits):
    monkeypatch.setattr(triton_forward, "key_splits", lambda *_: splits)
    assert_forward_accurate(PROBLEMS[name], torch.float32)
