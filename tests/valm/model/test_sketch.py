import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.valm.model.decoders import tiny_gpt2, tiny_llama
from valm.model.sketch import other_tensor, project, sketch

SIZE = 576  # of SmolLM2-135M


class Weights(nn.Module):
    """One tensor of each kind that a base has."""

    def __init__(self, scale=0.02):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q_proj = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator) * scale)
        self.norm = nn.Parameter(1 + torch.rand(SIZE, generator=generator) * 1e-2)  # the worst case of bfloat16
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("inverse", torch.rand(8), persistent=False)


@pytest.mark.parametrize("scale", [0.02, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_change(dtype, scale):
    expected = sketch(project(Weights(scale)))
    rounded = Weights(scale).to(dtype)
    assert other_tensor(project(rounded, expected), expected) is None
    narrow = sketch(project(rounded))
    for wide in (Weights(scale), Weights(scale).to(dtype).float(), Weights(scale).double()):
        assert other_tensor(project(wide, narrow), narrow) is None
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert other_tensor(project(Weights(scale).to(other), narrow), narrow) is None
    assert expected.keys() == {"q_proj", "norm", "mask"}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    "then, now, size",
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 1e-3),
        (torch.float16, torch.float16, 1e-3),
        (torch.bfloat16, torch.float32, 1e-3),
        (torch.float32, torch.bfloat16, 0.01),
    ],
)
def test_a_low_rank_change_is_found(rank, then, now, size):
    """Relative to the norm of the tensor; in 30 draws, as each may hide from the signs."""
    expected = sketch(project(Weights().to(then)))
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        change = torch.randn(SIZE, rank, generator=generator) @ torch.randn(rank, SIZE, generator=generator)
        model = Weights().to(then).to(now).float()
        with torch.no_grad():
            model.q_proj += change * (size * model.q_proj.norm() / change.norm())
        assert other_tensor(project(model.to(now), expected), expected) == "q_proj", seed


def test_names_and_shapes_are_compared():
    model = Weights()
    expected = sketch(project(model))
    model.register_buffer("added", torch.ones(1))
    assert other_tensor(project(model), expected) == "added"
    assert other_tensor(project(Weights()), expected | {"gone": expected["norm"]}) == "gone"
    assert other_tensor(project(Weights()), expected | {"norm": "float32:no base64"}) == "norm"
    assert other_tensor(project(Weights()), expected | {"norm": expected["norm"][:16]}) == "norm"
    with_a_letter_of_none = expected["norm"].replace(":", ":!")
    assert other_tensor(project(Weights()), expected | {"norm": with_a_letter_of_none}) == "norm"


def test_a_large_tensor_is_read_in_slabs():
    model = nn.Linear(1 << 11, 1 << 12, bias=False)  # two slabs
    expected = sketch(project(model))
    with torch.no_grad():
        model.weight[-1, -1] += 0.1
    assert other_tensor(project(model), expected) == "weight"


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])  # untied and tied
def test_offloaded_weights_are_read_where_they_are(base):
    model = base()
    expected = sketch(project(model))
    assert "lm_head.weight" in expected
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    assert other_tensor(project(offloaded), expected) is None
