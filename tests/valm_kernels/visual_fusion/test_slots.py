import pytest
import torch

from tests.valm_kernels.visual_fusion.problems import PROBLEMS
from valm_kernels import sort_image_slots, visual_fusion_attn


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pool_size", [1, 7, 40_000])
def test_slots_of_every_image_in_rising_order(pool_size, dtype):
    index = torch.randint(-1, pool_size, (3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=dtype)
    index[1, 2, 3] = pool_size - 1
    slots = sort_image_slots(index, pool_size)
    assert slots.dtype == torch.int32 and slots.shape == (pool_size + 1 + 60,)
    bounds, order = slots[: pool_size + 1].tolist(), slots[pool_size + 1 :]
    flat = index.flatten()
    assert order[: bounds[0]].tolist() == (flat == -1).nonzero().flatten().tolist()
    for image in {*flat[flat >= 0].tolist(), 0, pool_size // 2}:
        assert order[bounds[image] : bounds[image + 1]].tolist() == (flat == image).nonzero().flatten().tolist()
    assert bounds[-1] == 60


def test_slots_of_each_head():
    index = torch.randint(-1, 7, (3, 2, 5, 4), generator=torch.Generator().manual_seed(0))
    slots = sort_image_slots(index, 7)
    for head in range(2):
        assert slots[head].equal(sort_image_slots(index[:, head], 7))
    assert slots.dtype == torch.int32 and slots.shape == (2, 7 + 1 + 60) and not slots[0].equal(slots[1])


def test_a_pool_and_an_index_of_nothing():
    assert sort_image_slots(torch.full((1, 2, 1), -1), 0).tolist() == [2, 0, 1]
    assert sort_image_slots(torch.zeros(1, 2, 0, dtype=torch.int64), 2).tolist() == [0, 0, 0]


INDEX = torch.zeros(1, 1, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("index", "pool_size", "error", "message"),
    [
        ([[[0]]], 2, TypeError, "image_index must be an int32 or int64 tensor, got list"),
        (INDEX.float(), 2, TypeError, "int32 or int64 tensor, got torch.float32"),
        (INDEX[0], 2, ValueError, r"image_index must have 3 dimensions .* or 4, .* got shape \(1, 1\)"),
        (INDEX.to("meta"), 2, ValueError, "must be on the CPU, but is on meta"),
        (INDEX + 2, 2, ValueError, "a row of the pool from 0 to 1, got 2"),
        (INDEX - 2, 2, ValueError, "a row of the pool from 0 to 1, got -2"),
        *((INDEX, pool_size, TypeError, "pool_size must be an int") for pool_size in (5.0, True, "5")),
    ],
)
def test_wrong_arguments_raise(index, pool_size, error, message):
    with pytest.raises(error, match=message):
        sort_image_slots(index, pool_size)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["sorted slots", "by head, sorted slots"])
def test_slots_change_nothing_on_cpu_and_raise_if_they_belong_to_another_index(name, impl):
    inputs = PROBLEMS[name].inputs(torch.float32)
    slots = inputs.pop("image_slots")
    expected = visual_fusion_attn(**inputs, impl=impl)
    assert torch.equal(visual_fusion_attn(**inputs, image_slots=slots, impl=impl), expected)
    twice = slots.clone()
    twice[..., -1] = twice[..., -2]  # not a permutation
    swapped = slots.clone()
    swapped[..., [12, -1]] = swapped[..., [-1, 12]]  # of other images
    moved = slots.clone()
    moved[..., 3] += 1  # a bound
    for wrong in (twice, swapped, moved):
        with pytest.raises(ValueError, match="image_slots does not belong to this image_index"):
            visual_fusion_attn(**inputs, image_slots=wrong, impl=impl)
