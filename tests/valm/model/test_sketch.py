import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.valm.model.decoders import tiny_gpt2, tiny_llama, tiny_minimax
from valm.errors import ValmError
from valm.model.sketch import VERSION_KEY, _decoded, _sums, named_weights, other_tensor, sketch

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
    expected = sketch(Weights(scale))
    rounded = Weights(scale).to(dtype)
    assert other_tensor(sketch(rounded), expected) is None
    narrow = sketch(rounded)
    for wide in (Weights(scale), Weights(scale).to(dtype).float(), Weights(scale).double()):
        assert other_tensor(sketch(wide), narrow) is None
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert other_tensor(sketch(Weights(scale).to(other)), narrow) is None
    assert expected.keys() == {VERSION_KEY, "q_proj", "norm", "mask"}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    "then, now, size",
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 2e-3),
        (torch.float16, torch.float16, 1e-3),
        (torch.bfloat16, torch.float32, 2e-3),
        (torch.float32, torch.bfloat16, 0.01),
    ],
)
def test_a_low_rank_change_is_found(rank, then, now, size):
    """Relative to the norm of the tensor; in 30 random changes."""
    expected = sketch(Weights().to(then))
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        change = torch.randn(SIZE, rank, generator=generator) @ torch.randn(rank, SIZE, generator=generator)
        model = Weights().to(then).to(now).float()
        with torch.no_grad():
            model.q_proj += change * (size * model.q_proj.norm() / change.norm())
        assert other_tensor(sketch(model.to(now)), expected) == "q_proj", seed


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    "then, now", [(torch.float32,) * 2, *[(one,) * 2 for one in HALVES], *[(torch.float32, one) for one in HALVES]]
)
def test_one_changed_row_is_found(then, now):
    """As of one trained token, in the dtype that the base had or another."""
    changed = Weights()
    changed.q_proj.data[7] += 0.01
    for first, second in ((then, now), (now, then)):
        assert other_tensor(sketch(Weights().to(first)), sketch(Weights().to(second))) is None
        assert other_tensor(sketch(changed.to(first)), sketch(Weights().to(second))) == "q_proj"
        changed = changed.float()


def test_the_sums_are_of_the_values_wherever_they_lie():
    wide = torch.randn(5, 7)
    expected = _sums(wide)
    assert expected.keys() == {"float32", "bfloat16", "float16"}
    for same in (wide.t().contiguous().t(), torch.cat([wide, wide], 1)[:, :7], wide.expand(1, 5, 7)):
        assert _sums(same) == expected
    assert _sums(wide[:, ::2]) == _sums(wide[:, ::2].contiguous()) != expected
    assert _sums(torch.zeros(3, dtype=torch.bool)) == {"bool": 0} and _sums(torch.tensor(-1)) == {"int64": -1}
    assert _sums(torch.full((9,), -1)) == {"int64": -9} and _sums(torch.full((2,), 2**63 - 1)) == {"int64": -2}


def test_names_and_shapes_are_compared():
    model = Weights()
    expected = sketch(model)
    model.register_buffer("added", torch.ones(1))
    assert other_tensor(sketch(model), expected) == "added"
    assert other_tensor(sketch(Weights()), expected | {"gone": expected["norm"]}) == "gone"
    assert other_tensor(sketch(Weights()), expected | {"norm": "float32:no base64"}) == "norm"
    assert other_tensor(sketch(Weights()), expected | {"norm": expected["norm"][:16]}) == "norm"
    with_a_letter_of_none = expected["norm"].replace(":", ":!")
    assert other_tensor(sketch(Weights()), expected | {"norm": with_a_letter_of_none}) == "norm"


def test_a_sketch_of_another_version_is_refused():
    old = {"q_proj": "float32:AAAA"}
    for before in (old, old | {VERSION_KEY: "1"}):
        with pytest.raises(ValmError, match="another version of valm made the sketch of the base"):
            other_tensor(sketch(Weights()), before)
    assert other_tensor(sketch(Weights()), {}) == "mask"  # a VaLM has no base


@pytest.mark.parametrize("width", [1, 15, 64, 576])
def test_the_samples_are_spread(width):
    """Whatever the width of a tensor, few of its numbers are of one column or row."""
    model = nn.Linear(width, 600, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(600 * width).view(600, width))
    places = _decoded(sketch(model)["weight"])[1].long()
    assert len((places // width).unique()) == 16 and len((places % width).unique()) >= min(width, 8)


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])  # untied and tied
def test_offloaded_weights_are_read_where_they_are(base):
    model = base()
    expected = sketch(model)
    assert "lm_head.weight" in expected
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    assert other_tensor(sketch(offloaded), expected) is None


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2, tiny_minimax, Weights])
def test_the_weights_are_those_of_the_state(base):
    model = base()
    found = {name: tensor for name, _, tensor in named_weights(model)}
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in expected.items())


def with_noise(share, kind):
    """The sketch of Weights whose q_proj is quantised, with an error of this share of its norm."""
    model = Weights()
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.q_proj += noise * (share * model.q_proj.norm() / noise.norm())
    found = sketch(model)
    return found | {"q_proj": found["q_proj"].replace("float32:", f"{kind}:")}


@pytest.mark.parametrize("kinds", [("float32", "Int8Params"), ("Params4bit", "bfloat16"), ("gguf", "Int8Tensor")])
def test_a_quantised_weight_is_compared_coarsely(kinds):
    expected = with_noise(0, kinds[0])
    for share, other in ((0.2, None), (1.4, "q_proj")):  # 4 bits, and another model
        found = with_noise(share, kinds[1])
        assert other_tensor(found, expected) == "q_proj"
        assert other_tensor(found, expected, coarsely=True) == other
    other = Weights()
    other.norm.data *= 1.1
    moved = with_noise(0.2, kinds[1]) | {"norm": sketch(other)["norm"]}
    assert other_tensor(moved, expected, coarsely=True) == "norm"  # which is not quantised


def test_a_change_of_a_quantised_weight_is_found():
    expected = with_noise(0, "Int8Params")
    assert other_tensor(with_noise(0, "Int8Params"), expected) is None
    assert other_tensor(with_noise(1e-4, "Int8Params"), expected) == "q_proj"


def test_a_weight_without_numbers_is_none_of_a_model_that_is_not_quantised():
    found = sketch(Weights())
    for kind, other in (("float32", "q_proj"), ("Int4Tensor", None)):
        assert other_tensor(found, found | {"q_proj": f"{kind}::"}, coarsely=True) == other
