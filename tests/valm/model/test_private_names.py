"""A name of transformers that is gone is named, and not a family that would be refused for it."""

import pytest
import transformers
from transformers import PreTrainedModel
from transformers.integrations import accelerate, bitsandbytes

from tests.valm.model.decoders import IMAGE_DIM, IMAGES, augmented, tiny_llama
from valm.errors import ValmError
from valm.model.attention import catch
from valm.model.augment import augment
from valm.model.private_names import OVERRIDDEN, dequantized, offloaded_weight


def is_named(name):
    return pytest.raises(ValmError, match=rf"transformers {transformers.__version__} has no .*{name}, which valm needs")


def without(name, monkeypatch):
    for owner in PreTrainedModel.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_method_that_valm_overrides(name, monkeypatch):
    model = tiny_llama()
    without(name, monkeypatch)
    with is_named(f"PreTrainedModel.{name}"):
        augment(model, IMAGE_DIM, IMAGES)


def test_the_interface_of_attention(monkeypatch):
    model = tiny_llama()
    monkeypatch.delattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS")
    with is_named("ALL_ATTENTION_FUNCTIONS"):
        augment(model, IMAGE_DIM, IMAGES)


def test_the_attention_of_a_config(monkeypatch):
    model = tiny_llama()
    monkeypatch.delattr(transformers.PreTrainedConfig, "_attn_implementation")
    with is_named("LlamaConfig._attn_implementation"):
        augment(model, IMAGE_DIM, IMAGES)


def test_what_sets_the_attention_of_a_config(monkeypatch):
    """It may be renamed below a property that stays."""
    model = tiny_llama()
    monkeypatch.setattr(transformers.PreTrainedConfig, "_attn_implementation", "sdpa")
    with is_named("LlamaConfig._attn_implementation_internal"):
        augment(model, IMAGE_DIM, IMAGES)


def test_an_attention_that_does_not_call_the_interface():
    """As where a family reads its implementation elsewhere."""
    attention = augmented().model.layers[-2].self_attn
    attention.config = tiny_llama().config
    attention.forward = lambda **arguments: None
    with is_named("call of its attention interface in LlamaAttention"):
        catch(attention, {})


def test_adapters_of_transformers(monkeypatch, tmp_path):
    model = augmented()
    without("_hf_peft_config_loaded", monkeypatch)
    with is_named("_hf_peft_config_loaded"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "owner, name, read",
    [(accelerate, "load_offloaded_parameter", offloaded_weight), (bitsandbytes, "dequantize_bnb_weight", dequantized)],
)
def test_what_reads_a_weight(owner, name, read, monkeypatch):
    monkeypatch.delattr(owner, name)
    with is_named(name):
        read(None, None)
