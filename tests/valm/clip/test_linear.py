import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_accurate, assert_agree
from tests.valm.model.decoders import tiny_gpt2, tiny_llama
from tests.valm.tiny_clip import TEXTS
from valm.clip import linear as module
from valm.clip.linear import Int8Linear, PackedLinear, check_int8, linear, pack_layers
from valm.clip.text_tower import TextTower
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder


class OfOneself(torch.Tensor):
    """As a library of quantised weights has."""


@pytest.fixture(params=[True, False])
def vnni(request, monkeypatch):
    """Any processor computes the products of either way, if slowly."""
    monkeypatch.setattr(module, "has_vnni", lambda: request.param)


def drawn(rows, width, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    states, weight = (torch.randn(*shape, generator=generator) for shape in ((rows, width), (outputs, width)))
    return states, weight, torch.randn(outputs, generator=generator)


def rounded_in_float64(states, weight, bias):
    """The same roundings, and everything else in float64."""
    scale = (weight.abs().amax(1) / 127).double()[:, None]
    least, largest = states.amin(1, keepdim=True), states.amax(1, keepdim=True)
    step = (largest - least) / 255
    states = least.double() + step.double() * ((states - least) / step).round()
    weight = scale * (weight / scale.float()).round()
    return states @ weight.T + bias


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 17, 256, 300]),
    width=st.integers(2, 130),
    outputs=st.integers(1, 70),
    one_sided=st.booleans(),
    vnni=st.booleans(),
    seed=st.integers(0, 100),
)
def test_only_the_rounding_differs(rows, width, outputs, one_sided, vnni, seed):
    states, weight, bias = drawn(rows, width, outputs, seed)
    if one_sided:
        states = torch.nn.functional.gelu(states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "has_vnni", lambda: vnni)
        found = Int8Linear(weight, bias)(states)
    expected = rounded_in_float64(states, weight, bias)
    assert (found - expected).abs().max() < 2e-5 * width**0.5 * states.abs().max()
    exact = states.double() @ weight.double().T + bias
    # half a step of each factor, for each of `width` products, as if all had the same sign
    bound = 0.5 / 255 * (states.amax() - states.amin()) * weight.abs().sum(1).amax()
    bound += 0.5 / 127 * weight.abs().amax() * (states.abs().sum(1).amax() + width * states.abs().amax() / 127)
    assert (found - exact).abs().max() < bound


def test_the_error_on_activations_of_real_size():
    states, weight, bias = drawn(512, 512, 256, 0)
    for activations in (states, torch.nn.functional.gelu(states)):
        exact = activations.double() @ weight.double().T
        found = Int8Linear(weight, torch.zeros_like(bias))(activations)
        assert (found - exact).norm() / exact.norm() < 0.015


@pytest.mark.usefixtures("vnni")
def test_a_row_does_not_depend_on_the_others():
    states, weight, bias = drawn(263, 48, 33, 1)
    linear = Int8Linear(weight, bias)
    together = linear(states)
    for row in (0, 3, 255, 256, 262):
        assert torch.equal(linear(states[row : row + 1]), together[row : row + 1])
    states[5] = torch.nan
    assert linear(states)[5].isnan().all()
    rest = torch.arange(len(states)) != 5
    assert torch.equal(linear(states)[rest], together[rest])


@pytest.mark.usefixtures("vnni")
def test_rows_without_a_range_and_no_rows():
    _, weight, bias = drawn(1, 16, 8, 2)
    linear = Int8Linear(weight, bias)
    assert torch.equal(linear(torch.zeros(2, 16)), bias.expand(2, 8))
    torch.testing.assert_close(linear(torch.full((1, 16), 3.0))[0], bias + 3 * weight.sum(1), rtol=0, atol=0.3)
    assert linear(torch.zeros(0, 16)).shape == (0, 8)
    assert linear(torch.zeros(2, 0, 16)).shape == (2, 0, 8)
    weight[3] = 0
    assert (Int8Linear(weight, bias)(torch.randn(4, 16))[:, 3] == bias[3]).all()


@pytest.mark.parametrize("query", ["eot", "state"])
@pytest.mark.usefixtures("vnni")
def test_queries_of_an_int8_tower(clip, query):
    ids = torch.tensor([clip.tokenizer(text, add_special_tokens=False)["input_ids"][:19] for text in TEXTS])
    expected = ContextEncoder(clip, query=query)(ids)
    encoder = ContextEncoder(clip, query=query, dtype=torch.int8)
    found = encoder(ids)
    # this CLIP's large random weights make its attention a choice, which rounding now and then changes
    assert (found * expected).sum(-1).median() > 0.998
    assert not torch.equal(found, expected)
    cache = encoder.new_cache(2)
    steps = torch.cat([encoder.step(ids[:, place : place + 1], cache) for place in range(ids.shape[1])], 1)
    # a state on the edge between two steps may be rounded to the other one
    assert (steps * found).sum(-1).median() > 0.9999


def test_where_it_would_be_slow_it_is_refused(clip, monkeypatch):
    monkeypatch.setattr(module, "has_avx2", lambda: False)
    with pytest.raises(ValmError, match="no AVX2"):
        TextTower(clip, torch.int8)
    with pytest.raises(ValmError, match="cannot be int8 on meta: use bfloat16"):
        check_int8(torch.device("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
def test_packed_weights_give_the_same_products(rows, dtype):
    states, weight, bias = (tensor.to(dtype) for tensor in drawn(rows, 96, 70, rows))
    if not PackedLinear.can_pack(weight):
        pytest.skip("this PyTorch or processor packs no such weights")
    packed = PackedLinear(weight, bias)
    exact = torch.nn.functional.linear(states.double(), weight.double(), bias.double())
    eager = torch.nn.functional.linear(states, weight, bias)
    for one in (packed, pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed)):
        assert_accurate("products", one(states[None])[0], eager, exact)


def test_weights_that_change_are_packed_again():
    states, weight, bias = drawn(2, 16, 7, 0)
    packed = PackedLinear(weight, bias)
    weight.mul_(2)
    torch.testing.assert_close(packed(states), torch.nn.functional.linear(states, weight, bias))


def test_a_pickled_tower_has_its_weights_once(clip):
    tower = pickle.loads(pickle.dumps(TextTower(clip, torch.float32)))
    assert tower.linear[0].mlp_in.weight is tower.blocks[0].mlp.c_fc.weight


def test_without_the_operators_the_layer_is_an_ordinary_one(monkeypatch):
    states, weight, bias = drawn(5, 16, 7, 0)
    assert not PackedLinear.can_pack(weight.double()) and not PackedLinear.can_pack(weight.to("meta"))
    assert not PackedLinear.can_pack(torch.nn.Parameter(weight.as_subclass(OfOneself)))
    with torch.inference_mode():
        assert torch.equal(linear(weight.clone(), bias)(states), torch.nn.functional.linear(states, weight, bias))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(linear(weight, bias)(states), torch.nn.functional.linear(states, weight, bias))


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_a_model_with_packed_layers_computes_the_same(base, monkeypatch):
    model, ids = base().eval(), torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(module, "memory_limit", lambda: 10_000)
        pack_layers(model)
        assert not any(isinstance(layer.forward, PackedLinear) for layer in model.modules())  # it is too large
        monkeypatch.undo()
        pack_layers(model)
        assert any(isinstance(layer.forward, PackedLinear) for layer in model.modules())
        before = model.get_output_embeddings().forward
        pack_layers(model)
        assert model.get_output_embeddings().forward is before
        assert_agree(model(ids).logits, expected)
