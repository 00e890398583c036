from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.valm_kernels.roofline import Shape, forward, tables
from tests.valm_kernels.visual_fusion.problems import Problem

PAGE = Path(__file__).parents[2] / "docs" / "roofline.md"


def test_page_shows_what_the_script_computes():
    assert tables() in PAGE.read_text()


def test_pairs_are_those_of_the_causal_mask():
    shape = Shape("", B=2, H=3, Tq=4, Tk=7, K=0, D=8)
    visible = sum(key <= query + 3 for query in range(4) for key in range(7))
    assert shape.pairs == 2 * 3 * visible


def test_bytes_of_the_forward_are_those_of_its_tensors():
    problem = Problem(
        batch=2, query_heads=3, kv_heads=3, num_queries=5, prefix=2, num_images=4, head_dim=8, biases=False
    )
    for pool_size in (0, 6):
        inputs = replace(problem, pool_size=pool_size or None, gaps=False).inputs(torch.float16)
        out_bytes, lse_bytes = inputs["q"].nbytes, 4 * 2 * 3 * 5
        moved = sum(t.nbytes for t in inputs.values() if isinstance(t, torch.Tensor)) + out_bytes + lse_bytes
        assert forward(Shape("", B=2, H=3, Tq=5, Tk=7, K=4, D=8, U=pool_size)).bytes == moved
