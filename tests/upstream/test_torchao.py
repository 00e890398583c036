"""A base that torchao has quantised."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.upstream.quantised import check_adapters, logits, opened, save_bases, with_images
from tests.valm.model.decoders import random_ids, random_images
from valm.errors import ValmError
from valm.model.adapter import save_adapter
from valm.model.augment import fusion_module
from valm.model.sketch import other_tensor, sketch

quantization = pytest.importorskip("torchao.quantization", reason="needs the package torchao (extra compat)")
pytestmark = pytest.mark.slow


def int8(skip=None):
    return {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skip)}


def int8_inputs():
    return {"quantization_config": TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())}


def float8():
    return {"quantization_config": TorchAoConfig(quantization.Float8WeightOnlyConfig()), "dtype": torch.bfloat16}


@pytest.mark.parametrize("quantised", [int8, int8_inputs, float8])
def test_an_adapter_on_a_quantised_base(tmp_path, quantised):
    save_bases(tmp_path)
    check_adapters(tmp_path, quantised)


def test_the_fusion_trains_and_a_whole_folder_opens(tmp_path):
    save_bases(tmp_path)
    model, ids = with_images(opened(tmp_path / "base", **int8())), random_ids(2, 9)
    model(ids, labels=ids, **random_images(2, 9)).loss.backward()
    assert all(parameter.grad.any() for parameter in fusion_module(model).parameters())
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()), logits(model))


def test_a_change_of_a_quantised_weight_is_found(tmp_path):
    save_bases(tmp_path)
    model = with_images(opened(tmp_path / "base", **int8()))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.qdata += 1
    with pytest.raises(ValmError, match=r"layers\.0\.mlp\.up_proj\.weight has changed"):
        save_adapter(model, tmp_path / "adapter")


def test_a_weight_that_torchao_does_not_dequantise_is_not_compared():
    made = quantization.Int4Tensor(
        torch.zeros(32, 32, dtype=torch.int8), torch.ones(2, 32), torch.zeros(2, 32), [1, 32], torch.Size([32, 64])
    )
    with pytest.raises(NotImplementedError):
        made.dequantize()
    packed, plain = nn.Linear(64, 32), nn.Linear(64, 32)
    plain.bias = packed.bias
    packed.weight = nn.Parameter(made, requires_grad=False)
    expected = sketch(packed)
    assert expected["weight"] == "Int4Tensor::"
    assert other_tensor(sketch(packed), expected) is None
    assert other_tensor(sketch(plain), expected) == "weight"
    assert other_tensor(sketch(plain), expected, coarsely=True) is None
    assert other_tensor(sketch(packed), sketch(plain), coarsely=True) is None
