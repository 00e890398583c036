"""What PyTorch's flash attention of CPUs does that valm_kernels/visual_fusion/cpu.py has to work around.

A release that changes one of these points shows itself here, and the workaround can go.
"""

import os
import subprocess
import sys

import pytest
import torch

from valm_kernels.visual_fusion.cpu import _flash, _flash_backward

pytestmark = pytest.mark.slow


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_causal_is_aligned_top_left(qkv):
    q, k, v = qkv
    assert torch.allclose(_flash(q[:, :, :4], k, v, 0.0, True)[0], _flash(q, k, v, 0.0, True)[0][:, :, :4])


def test_reports_lse_zero_for_an_empty_row(qkv):
    mask = torch.zeros(12, 12, dtype=torch.float64)
    mask[3] = -torch.inf
    out, lse = _flash(*qkv, 0.0, False, attn_mask=mask)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == 0).all()


def test_misreads_a_strided_last_dimension(qkv):
    q, k, v = qkv
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert not torch.allclose(_flash(strided, k, v)[0], _flash(q, k, v)[0])


def test_shares_keys_between_the_heads_of_a_group(qkv):
    q, k, v = qkv
    q = torch.cat([q, q.flip(1)], 1)  # 4 heads beside 2
    repeated = [t.repeat_interleave(2, 1) for t in (k, v)]
    out, lse = _flash(q, k, v, 0.0, True)
    expected_out, expected_lse = _flash(q, *repeated, 0.0, True)
    assert out.equal(expected_out) and lse.equal(expected_lse)


def test_gives_nan_for_a_scale_of_zero_or_less(qkv):
    assert _flash(*qkv, 0.0, True, scale=-1.0)[0].isnan().any()
    assert _flash(*qkv, 0.0, True, scale=0.0)[0].isnan().any()


def test_refuses_boolean_and_three_dimensional_masks(qkv):
    mask = torch.ones(12, 12, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="mask"):
        _flash(*qkv, 0.0, False, attn_mask=mask)
    with pytest.raises(RuntimeError, match="mask"):
        _flash(*qkv, 0.0, False, attn_mask=mask.double()[None])


def test_backward_takes_lse_gradient_through_a_padded_column(qkv):
    q, k, v = (t.requires_grad_() for t in qkv)
    scores = (q @ k.mT).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
    lse = scores.logsumexp(-1)
    grad_lse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(lse, (q, k), grad_lse)
    with torch.no_grad():
        q, k, v, out = (torch.nn.functional.pad(t, (0, 8)) for t in (q, k, v, scores.softmax(-1) @ v))
        grad_out = torch.zeros_like(out)
        out[..., 8], grad_out[..., 8] = -1, grad_lse
        found = _flash_backward(grad_out, q, k, v, out, lse, 0.0, True, scale=1.0)
    for gradient, truth in zip(found, expected, strict=False):
        assert torch.allclose(gradient[..., :8], truth, rtol=0, atol=4e-15)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_waits_forever_in_a_forked_child_with_several_threads():
    """libgomp's threads do not survive a fork, and its barrier waits for them: forever, at 100 % of a core with
    OMP_WAIT_POLICY=active, otherwise asleep. Nothing of valm_kernels is involved; a data loader's workers have one
    thread."""
    code = (
        "import os, signal, time, torch\n"
        "torch.set_num_threads(2)\n"
        "q = torch.randn(2, 4, 64, 16)\n"
        "attend = torch.nn.functional.scaled_dot_product_attention\n"
        "def finishes(threads):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        torch.set_num_threads(threads)\n"
        "        attend(q, q, q, is_causal=True)\n"
        "        os._exit(0)\n"
        "    for _ in range(500):\n"
        "        if os.waitpid(child, os.WNOHANG)[0]: return True\n"
        "        time.sleep(0.01)\n"
        "    os.kill(child, signal.SIGKILL)\n"
        "    os.waitpid(child, 0)\n"
        "    return False\n"
        "attend(q, q, q, is_causal=True)\n"
        "print(finishes(1), finishes(2))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["True", "False"]
