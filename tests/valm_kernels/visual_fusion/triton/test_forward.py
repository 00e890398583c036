"""The forward kernels under Triton's interpreter; test_interpreted.py starts the process.

That forward and backward agree with the reference on every problem is in test_backward.py.
"""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py with TRITON_INTERPRET=1", allow_module_level=True)

from tests.valm_kernels.visual_fusion.problems import (
    PROBLEMS,
    Problem,
    assert_masked_images_may_be_anything,
    assert_passes_nan_on,
    assert_result_accurate,
)
from tests.valm_kernels.visual_fusion.triton.small_tiles import use_small_tiles
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion.triton import forward


def assert_forward_accurate(problem, dtype):
    def attend(impl, dtype):
        return visual_fusion_attn(**problem.inputs(dtype), impl=impl, return_lse=True, return_image_weights=True)

    results = zip(attend("triton", dtype), attend("reference", dtype), attend("reference", torch.float64), strict=True)
    for name, (actual, eager, truth) in zip(("out", "lse", "image_weights"), results, strict=True):
        assert_result_accurate(name, actual, eager, truth, dtype)


@pytest.mark.parametrize(
    ("name", "splits"),
    [("decode", 1), ("group of three, decode", 5), ("left padding decode", 2), ("random first_key with prefix", 2)],
)
def test_split_keys(monkeypatch, name, splits):
    problem = replace(PROBLEMS[name], batch=1) if name.startswith("random") else PROBLEMS[name]
    use_small_tiles(monkeypatch, problem)
    monkeypatch.setattr(forward, "splits_of", lambda *_: splits)
    assert_forward_accurate(problem, torch.float32)


@pytest.mark.parametrize("name", ["decode", "decode few", "documents"])
def test_agrees_in_float16(monkeypatch, name):
    use_small_tiles(monkeypatch, PROBLEMS[name])
    assert_forward_accurate(PROBLEMS[name], torch.float16)


def test_splits_fill_the_chip_but_keep_keys_to_work_on():
    def splits(programs, k_len, has_images=False, decoding=True):
        return forward.splits_of(programs, k_len, has_images, multiprocessors=132, decoding=decoding)

    assert splits(132, 10**6) == splits(132, 10**6, has_images=True) == 1
    assert splits(12, 8192) == 22
    assert splits(12, 1024) == 4
    assert splits(12, 100) == 1
    assert splits(1, 10**6) == splits(1, 10**6, has_images=True) == forward.MAX_SPLITS
    # the images are one more
    assert splits(12, 1024, has_images=True) == 5
    assert splits(12, 100, has_images=True) == 2
    # of B1 H12 T1024, 96 programs: each split would write 3 MB
    assert splits(96, 1024, has_images=True) == 4 and splits(96, 1024, has_images=True, decoding=False) == 1
    assert splits(33, 8192, decoding=False) == 8 and splits(34, 8192, decoding=False) == 1  # a part of a long prompt


@pytest.mark.parametrize("first", ["monotone", "random"])
def test_first_key_skips_whole_tiles(monkeypatch, first):
    """A tile that no query may see is not read: a NaN in it would reach the output through 0 * NaN."""
    problem = Problem(batch=1, num_queries=96, num_images=2, pool_size=5)
    use_small_tiles(monkeypatch, problem)  # tiles of 32
    inputs = problem.inputs(torch.float32)
    first_key = torch.full((1, 96), 64, dtype=torch.int32)
    if first == "random":
        first_key += torch.randint(0, 20, (1, 96), generator=torch.Generator().manual_seed(0)).int()
    expected = visual_fusion_attn(**inputs, first_key=first_key, impl="triton")
    inputs["v"][:, :, :64] = torch.nan
    assert torch.equal(visual_fusion_attn(**inputs, first_key=first_key, impl="triton"), expected)


def test_splits_share_out_the_keys_of_a_window(monkeypatch):
    """Each of the splits has a part of what the window leaves, not of all keys."""
    problem = Problem(batch=1, query_heads=1, kv_heads=1, num_queries=1, prefix=511, num_images=0, biases=False)
    use_small_tiles(monkeypatch, problem)  # tiles of 64
    monkeypatch.setattr(forward, "splits_of", lambda *_: 4)
    parts = []
    monkeypatch.setattr(forward, "_merge_kernel", Recorder(forward._merge_kernel, parts))
    inputs = problem.inputs(torch.float32)
    inputs["first_key"] = torch.full((1, 1), 256, dtype=torch.int32)
    out = visual_fusion_attn(**inputs, impl="triton")
    for split in range(4):
        window = slice(256 + 64 * split, 320 + 64 * split)
        k, v = inputs["k"][:, :, window], inputs["v"][:, :, window]
        expected = visual_fusion_attn(inputs["q"], k, v, None, None, impl="reference")
        torch.testing.assert_close(parts[0][split], expected)
    torch.testing.assert_close(out, visual_fusion_attn(**inputs, impl="reference"))


class Recorder:
    """A kernel that also keeps a copy of its first argument."""

    def __init__(self, kernel, kept):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        def launch(first, *arguments, **keywords):
            self.kept.append(first.clone())
            self.kernel[grid](first, *arguments, **keywords)

        return launch


@pytest.mark.parametrize("name", ["q", "image_k", "image_v"])
def test_nan_is_passed_on(name):
    assert_passes_nan_on("triton", name, torch.float32)


def test_masked_images_may_be_anything():
    assert_masked_images_may_be_anything("triton")


def test_rows_that_overlap():
    """torch.empty_like makes of q a tensor without contiguous rows."""
    inputs = Problem(num_queries=5, head_dim=16).inputs(torch.float32)
    q = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0)).unfold(2, 16, 1)
    expected = visual_fusion_attn(**inputs | {"q": q.contiguous()}, impl="triton")
    assert visual_fusion_attn(**inputs | {"q": q}, impl="triton").equal(expected)


@pytest.mark.parametrize("index", [-2, 11])
def test_index_out_of_range_is_found_where_asked(monkeypatch, index):
    monkeypatch.setattr(forward, "CHECK_INDEX", True)
    inputs = PROBLEMS["pooled"].inputs(torch.float32)
    inputs["image_index"][1, 3, 2] = index
    with pytest.raises(ValueError, match=rf"image_index must be -1 .* from 0 to 10, got {index}"):
        visual_fusion_attn(**inputs, impl="triton")
