"""The kernels in the guarded interpreter, and mutants of them that have to be found; test_interpreted.py starts it."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py with TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.valm_kernels.visual_fusion.problems import PROBLEMS, assert_solves
from tests.valm_kernels.visual_fusion.triton.guarded_interpreter import guarded, tf32x3
from tests.valm_kernels.visual_fusion.triton.mutants import kernels_of, mutant
from tests.valm_kernels.visual_fusion.triton.small_tiles import quick_or_slow, use_small_tiles

QUICK = {("decode few", torch.bfloat16), ("documents with prefix", torch.float32)}


def cases():
    for name in PROBLEMS:
        for dtype in (torch.float32, torch.bfloat16):
            yield pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype"), list(cases()), ids=str)
def test_kernels_keep_to_their_memory(monkeypatch, name, dtype):
    use_small_tiles(monkeypatch, PROBLEMS[name])
    with guarded():
        assert_solves("triton", PROBLEMS[name], dtype)


@triton.jit
def _copy(x, y, shift, BLOCK: tl.constexpr, PROMISE: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = x + o + shift
    if PROMISE:
        p = tl.max_contiguous(tl.multiple_of(p, BLOCK), BLOCK)
    tl.store(y + o, tl.load(p))


def copy(x, y, shift=0, promise=False):
    with guarded():
        _copy[(2,)](x, y, shift, BLOCK=16, PROMISE=promise)


def test_guard_finds_each_kind_of_error():
    x, y = torch.arange(32.0), torch.zeros(32)
    copy(x, y, promise=True)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match="load outside of every tensor"):
        copy(x, y, shift=1)
    with pytest.raises(InterpreterError, match="store outside of every tensor"):
        copy(x, y[:31])
    with pytest.raises(InterpreterError, match="promised as multiples of 16"):
        copy(torch.zeros(64)[: 32 + 2][1:], y, shift=1, promise=True)
    memory = torch.arange(48.0)
    # in one memory, what one program stores is what the other loads, in either order
    for seed in range(4):
        with pytest.raises(InterpreterError, match="another program"), guarded(seed):
            _copy[(2,)](memory[:32], memory[16:], 0, BLOCK=16, PROMISE=False)


def test_tf32x3_is_nearly_float32():
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(tf32x3(a, b) - exact).max()
    assert 0 < error < 2e-5
    # one product of tf32 alone is a thousand times worse
    assert np.abs((a.astype(np.float16) @ b.astype(np.float16)).astype(np.float64) - exact).max() > 100 * error


# What a mask or clamp protects, taken away. Each has to be found by the guard or by the comparison with the reference.
MUTANTS = {
    "keys past the last": mutant("m_n = m_n & (o_n < Tk)[:, None]", "pass"),
    "rows past the last": mutant("o_t = tl.minimum(o_t, Tq - 1)", "o_t = o_t"),
    "heads past the last": mutant("tl.minimum(o_g, G - 1)", "o_g", query_heads=3, kv_heads=1),
    "columns past the last": mutant("(tl.arange(0, BLOCK_D) < D)[None, :], other", "True, other", head_dim=13),
    "slots without an image": mutant(
        "m_image = m_image[:, None] & (", "m_image = (m_image | True)[:, None] & (", pool_size=4
    ),
    "first_key out of range": mutant(
        "tl.minimum(tl.maximum(tl.load(first_key + i_b * Tq + o_t), 0), Tk)",
        "tl.load(first_key + i_b * Tq + o_t)",
        first_key="extreme",
    ),
    "keys before first_key": mutant("(o_n[None, :] >= b_first[:, None]) & ", "", first_key="documents"),
    "queries that see a part of the keys": mutant(
        "full = tl.maximum(full, tl.max(b_full, 0))", "pass", first_key="random"
    ),
    "keys past the last, gradient": mutant("(o_n < n_keys)[:, None]", "(o_n >= 0)[:, None]"),
    "output columns past the last": mutant(
        "m_row[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]", "m_row[:, None]", head_dim=13
    ),
    "splits past the last": mutant("mask=o_s < n_splits, other", "mask=o_s >= 0, other", num_queries=1, prefix=100),
    "delta of rows past the last": mutant("b_delta, mask=m_row)", "b_delta)"),
    "coefficients of rows past the last": mutant("b_b, mask=m_row)", "b_b)", pool_size=4),
    "gradient of image_score_bias past the last": mutant("b_dscore, mask=o_t1 < Tq)", "b_dscore)", score_bias=True),
    "gradients of keys past cache_seqlens": mutant(
        "b_dv = tl.where(m_n, b_dv, 0.0)", "pass", prefix=7, seqlens=True, causal=False
    ),
    "gradients of tiles past cache_seqlens": mutant("mask=m_stored)", "mask=m_n)", prefix=7, seqlens=True),
    "cache_seqlens of another row": mutant(
        "tl.load(cache_seqlens + i_b)", "tl.load(cache_seqlens)", batch=2, prefix=7, seqlens=True
    ),
    "gradient of image scores of rows past the last": mutant(
        "mask=m_row & m_image, other", "mask=m_image, other", weights=True
    ),
    "bias of a slot without an image": mutant(
        "tl.where(m_image, b_t, float", "tl.where(m_image | (b_t != b_t), b_t, float", score_bias=True
    ),
    "dense gradients past the last": mutant("m_t1 = (o_t1 < Tq)[:, None] & ", "m_t1 = (o_t1 >= 0)[:, None] & "),
}
QUICK_MUTANTS = {"keys past the last", "output columns past the last"}


@pytest.mark.parametrize("name", quick_or_slow(MUTANTS, QUICK_MUTANTS))
def test_mutants_are_found(monkeypatch, tmp_path, name):
    problem = MUTANTS[name].problem
    with kernels_of(MUTANTS[name], monkeypatch, tmp_path) as modules:
        use_small_tiles(monkeypatch, problem, modules["launch"], modules["forward"])
        with guarded(), pytest.raises((InterpreterError, AssertionError)):
            assert_solves("triton", problem, torch.float32)
