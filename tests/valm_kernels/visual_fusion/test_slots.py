import pytest
import torch

from valm_kernels.visual_fusion.slots import sorted_slots


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pool_size", [1, 7, 40_000])
def test_slots_of_every_image_in_rising_order(pool_size, dtype):
    index = torch.randint(-1, pool_size, (3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=dtype)
    index[1, 2, 3] = pool_size - 1
    order, bounds = sorted_slots(index, pool_size)
    assert bounds.shape == (pool_size + 1,) and bounds[-1] == 60
    flat = index.flatten()
    assert order[: bounds[0]].tolist() == (flat == -1).nonzero().flatten().tolist()
    for image in {*flat[flat >= 0].tolist(), 0, pool_size // 2}:
        assert order[bounds[image] : bounds[image + 1]].tolist() == (flat == image).nonzero().flatten().tolist()


def test_slots_of_each_head():
    index = torch.randint(-1, 7, (3, 2, 5, 4), generator=torch.Generator().manual_seed(0))
    order, bounds = sorted_slots(index, 7)
    for head in range(2):
        of_head = sorted_slots(index[:, head], 7)
        assert order[head].equal(of_head[0]) and bounds[head].equal(of_head[1])
    assert not order[0].equal(order[1])


def test_a_pool_and_an_index_of_nothing():
    order, bounds = sorted_slots(torch.full((1, 2, 1), -1), 0)
    assert (order.tolist(), bounds.tolist()) == ([0, 1], [2])
    order, bounds = sorted_slots(torch.zeros(1, 2, 0, dtype=torch.int64), 2)
    assert (order.tolist(), bounds.tolist()) == ([], [0, 0, 0])
