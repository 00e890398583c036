from dataclasses import replace

import pytest
import torch

from benchmarks.valm_kernels import roofline
from benchmarks.valm_kernels.roofline import Shape, forward
from tests.valm_kernels.visual_fusion.problems import Problem


def test_estimates_are_above_the_roof():
    """Launches, the sort of the pool and the host only add to it."""
    for shape in roofline.SHAPES:
        for backward, works in ((False, roofline.forward_works(shape)), (True, roofline.backward_works(shape))):
            least = sum(work.least_s for work in works)
            assert roofline.gpu_s(works) >= least + len(works) * roofline.LAUNCH_S
            assert roofline.host_s(shape, backward) > roofline.FORWARD_HOST_S
    dense, pooled = roofline.SHAPES[:2]
    sort = roofline.sort(pooled)
    assert sort in roofline.backward_works(pooled) and sort not in roofline.backward_works(dense)
    assert sort.launches == roofline.SORT_LAUNCHES + 2  # int16
    assert roofline.sort(replace(pooled, U=1 << 15)).launches == roofline.SORT_LAUNCHES + 4  # int32


def test_roof_of_a_search_is_its_bytes_and_then_its_products():
    assert roofline.topk_s(64, 1_000_000, 768) == pytest.approx(1_000_000 * (2 * 768 + 4) / 3.35e12)
    assert roofline.topk_s(4096, 1_000_000, 768) == pytest.approx(2 * 4096 * 1_000_000 * 768 / 989e12)


def test_grouped_heads_share_keys_and_images():
    single = Shape("", B=2, H=8, Tq=16, Tk=16, K=3, D=8)
    grouped = replace(single, G=4)
    assert grouped.query_bytes == single.query_bytes and grouped.pairs == single.pairs
    assert 4 * grouped.key_bytes == single.key_bytes and 4 * grouped.image_bytes == single.image_bytes


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
