"""What PyTorch's flash attention of CPUs does that valm_kernels/visual_fusion/cpu.py has to work around.

A release that changes one of these points shows itself here, and the workaround can go.
"""

import os
import subprocess
import sys

import pytest
import torch

from valm_kernels.visual_fusion.cpu import _flash

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


def test_gives_nan_for_a_scale_of_zero_or_less(qkv):
    assert _flash(*qkv, 0.0, True, scale=-1.0)[0].isnan().any()
    assert _flash(*qkv, 0.0, True, scale=0.0)[0].isnan().any()


def test_refuses_boolean_and_three_dimensional_masks(qkv):
    mask = torch.ones(12, 12, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="mask"):
        _flash(*qkv, 0.0, False, attn_mask=mask)
    with pytest.raises(RuntimeError, match="mask"):
        _flash(*qkv, 0.0, False, attn_mask=mask.double()[None])


FORKS = """
import os, signal, time, torch

torch.set_num_threads(2)
q = torch.randn(2, 4, 64, 16)
attend = torch.nn.functional.scaled_dot_product_attention


def finishes(threads):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        attend(q, q, q, is_causal=True)
        os._exit(0)
    for _ in range(500):
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


attend(q, q, q, is_causal=True)
print(finishes(1), finishes(2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_waits_forever_in_a_forked_child_with_several_threads():
    """libgomp's threads do not survive a fork, and its barrier waits for them: forever, at 100 % of a core with
    OMP_WAIT_POLICY=active, otherwise asleep. Nothing of valm_kernels is involved; a data loader's workers have one
    thread."""
    run = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["True", "False"]
