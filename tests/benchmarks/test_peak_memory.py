import sys

import pytest
import torch

from benchmarks.peak_memory import peak_mb

MB = 2**20 // 4  # float32 elements


def temporary_of_60_and_result_of_20():
    def call():
        torch.ones(60 * MB)
        torch.empty(500 * MB)  # never touched
        return torch.ones(20 * MB)

    return call


@pytest.mark.slow  # a process that imports torch
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_counts_the_pages_touched_at_one_time():
    assert peak_mb(temporary_of_60_and_result_of_20) == pytest.approx(60 * 2**20 / 1e6, rel=0.05)
