from dataclasses import replace

import pytest
import torch

from benchmarks.valm_kernels import roofline
from benchmarks.valm_kernels.roofline import Shape, forward
from tests.valm_kernels.visual_fusion.problems import Problem


def test_nothing_is_below_the_floor():
    """Kernels, launches, the sort of the pool and the operations of PyTorch only add to it."""
    for shape in roofline.SHAPES:
        directions = [(roofline.forward, roofline.forward_works, False)]
        directions += [(roofline.whole_backward, roofline.backward_works, True)]
        for floor, works, backward in directions[: 1 + (shape.Tq > 1)]:
            least = floor(shape).least_s
            assert roofline.gpu_s(works(shape)) >= least + len(works(shape)) * roofline.LAUNCH_S
            peer = [roofline.text(shape, backward), roofline.images_in_pytorch(shape, backward)]
            assert roofline.gpu_s(peer) > least
    decoding = roofline.SHAPES[-1]
    assert decoding.Tq == 1 and roofline.host_s(decoding, False) == roofline.DECODING_HOST_S
    dense, pooled = roofline.SHAPES[:2]
    assert roofline.host_s(dense, False) < roofline.host_s(dense, True) < roofline.host_s(pooled, True)
    sort = roofline.sort(pooled)
    assert sort in roofline.backward_works(pooled) and sort not in roofline.backward_works(dense)
    assert sort.launches == roofline.SORT_LAUNCHES + 2  # int16
    assert roofline.sort(replace(pooled, U=1 << 15)).launches == roofline.SORT_LAUNCHES + 4  # int32


def test_floor_of_a_search_is_its_bytes_and_then_its_products():
    assert roofline.topk_s(64, 1_000_000, 768) == pytest.approx(1_000_000 * (2 * 768 + 4) / 3.35e12)
    assert roofline.topk_s(4096, 1_000_000, 768) == pytest.approx(2 * 4096 * 1_000_000 * 768 / 989e12)


def test_queries_of_a_block_share_a_read_of_the_rows():
    queries = (1, 16, 17, 64, 65, 128, 4096)
    assert [roofline.queries_of_block(n) for n in queries] == [16, 16, 32, 64, 128, 128, 128]
    # 8 blocks of 128 queries are bound by the products
    launches = roofline.SEARCH_LAUNCHES * roofline.LAUNCH_S
    products = 2 * 1024 * 1_000_000 * 768 / (roofline.MMA_SYNC_SHARE * roofline.BF16_FLOP_PER_S)
    assert roofline.search_s(1024, 1_000_000, 768) == pytest.approx(products + launches)
    assert roofline.search_s(64, 1_000_000, 768) > roofline.topk_s(64, 1_000_000, 768)


def test_traffic_of_pytorch_is_counted_without_views():
    with roofline.Traffic() as traffic:
        torch.empty(4, 8, device="meta").view(2, 16).mul(2).t().sum(1)
    assert traffic.operations == 3 and traffic.bytes == 4 * (32 + 2 * 32 + 32 + 16)  # empty, mul, sum


@pytest.mark.parametrize("backward", [False, True])
def test_the_peer_reads_the_images_and_makes_a_pool_dense(backward):
    shape = Shape("", B=2, H=3, Tq=5, Tk=5, K=4, D=8, G=3)
    dense, pooled = (roofline.images_in_pytorch(one, backward) for one in (shape, replace(shape, U=6)))
    assert dense.bytes > 2 * shape.image_bytes + shape.query_bytes and dense.launches > 8
    gathered = 2 * 2 * 5 * 4 * (2 * 8 + 8)  # the rows and their indices
    assert pooled.bytes - dense.bytes == gathered + (2 + 2 * backward) * 2 * 6 * 8
    assert pooled.launches == dense.launches + 2


def test_a_decoding_query_is_merged_from_its_splits():
    kernels = {shape.name: [work.kernel for work in roofline.forward_works(shape)] for shape in roofline.SHAPES}
    assert kernels["B4 H16 T4096 K8 D64, dense"] == ["forward"]
    assert kernels["B1 H12 Tq1 Tk8192 K8 D64, dense (decoding)"] == ["forward", "forward: merge of the splits"]


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
