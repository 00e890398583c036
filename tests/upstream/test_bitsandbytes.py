"""A base that bitsandbytes has quantised."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.upstream.quantised import SIZES, check_adapters, logits, opened, save_bases, with_images
from tests.valm.model.decoders import IMAGE_DIM, IMAGES, augmented, random_ids, random_images, tiny_llama
from valm.errors import ValmError
from valm.model.adapter import save_adapter
from valm.model.augment import augment, fusion_module

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra compat)")
pytestmark = pytest.mark.slow


def in_8_bits(skip=None):
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)}


def fp4():
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}


def nf4_twice():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": config, "dtype": torch.bfloat16}


def that_has_run(folder, **options):
    """On a CPU with bfloat16 this packs the weights of 4 bits, which cannot be read then."""
    base = opened(folder, **options)
    with torch.no_grad():
        base(random_ids(1, 4))
    return base


@pytest.mark.parametrize("make_base", [opened, that_has_run])
@pytest.mark.parametrize("quantised", [in_8_bits, fp4, nf4_twice])
def test_an_adapter_on_a_quantised_base(tmp_path, quantised, make_base):
    save_bases(tmp_path)
    check_adapters(tmp_path, quantised, make_base)


@pytest.mark.parametrize("quantised", [in_8_bits, fp4])
def test_augmenting_and_saving_leave_the_weights_as_they_were(tmp_path, quantised):
    """On a CPU with bfloat16, state_dict() spoils weights of 4 bits."""
    save_bases(tmp_path)
    expected = opened(tmp_path / "base", **quantised())
    model = augment(opened(tmp_path / "base", **quantised()), IMAGE_DIM, IMAGES).eval()
    none = {"image_pool": torch.zeros(0, IMAGE_DIM), "image_index": torch.full((2, 9, IMAGES), -1)}
    with torch.no_grad():
        for folder in (None, tmp_path / "adapter"):
            if folder is not None:
                save_adapter(model, folder)
            assert torch.equal(model(random_ids(2, 9), **none).logits, expected(random_ids(2, 9)).logits)


@pytest.mark.parametrize("quantised", [in_8_bits, fp4])
def test_the_fusion_trains(tmp_path, quantised):
    save_bases(tmp_path)
    model, ids = with_images(opened(tmp_path / "base", **quantised())).train(), random_ids(2, 9)
    model(ids, labels=ids, **random_images(2, 9)).loss.backward()
    assert all(parameter.grad.any() for parameter in fusion_module(model).parameters())
    save_adapter(model, tmp_path / "adapter")


def test_a_whole_folder_opens_in_8_bits(tmp_path):
    model = augmented(lambda seed: tiny_llama(seed, **SIZES)).eval()
    model.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, **in_8_bits()).eval()
    assert (logits(whole) - logits(model)).norm() < 0.2 * logits(model).norm()
    assert fusion_module(whole).k_bias.requires_grad
    assert not any(p.requires_grad for name, p in whole.named_parameters() if p.dtype == torch.int8)


def test_a_change_of_a_quantised_weight_is_found(tmp_path):
    save_bases(tmp_path)
    model = with_images(opened(tmp_path / "base", **in_8_bits()))
    model.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValmError, match=r"layers\.0\.mlp\.up_proj\.weight has changed"):
        save_adapter(model, tmp_path / "adapter")
