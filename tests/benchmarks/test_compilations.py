"""The count of compilations runs the launchers of a test's forward and backward."""

import torch

from benchmarks.valm_kernels.compilations import launches
from tests.valm_kernels.visual_fusion.problems import PROBLEMS


def test_a_problem_launches_its_kernels():
    found = {launch.kernel.__name__ for launch in launches(PROBLEMS["pooled"], torch.float16)}
    assert any("forward" in name for name in found) and any("pool" in name for name in found), found
