import functools
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel
from transformers.models.ministral3 import modeling_ministral3

from tests.checks.families import VISION, tiny
from tests.valm.model.decoders import IMAGE_DIM, IMAGES, tiny_gpt2, tiny_llama
from valm.errors import ValmError
from valm.model.augment import augment
from valm.model.probe import attention_path, decoder_layers
from valm.training.limited_softmax import LimitedSoftmax


@pytest.mark.parametrize("family", VISION)
def test_the_layers_are_those_of_the_text_and_not_of_a_vision_tower(family):
    model = tiny(family)
    layers = decoder_layers(model)
    assert layers is model.get_decoder().layers and len(layers) == 4
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    assert any("vis" in name for name in names), "there is no vision tower"


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_without_keys_of_their_own(family, tmp_path):
    """The last two layers of four attend to the keys of layers before them."""
    with pytest.warns(UserWarning, match="layer -2 has no attention with keys of its own.*layer -3"):
        model = augment(tiny(family), IMAGE_DIM, IMAGES)
    assert model.config.fusion["layer"] == -3
    for layer in (-1, 2):
        with pytest.raises(ValmError, match=f"layer {layer} .* takes its keys and values from another .*: 0, 1$"):
            augment(tiny(family), IMAGE_DIM, IMAGES, layer)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.fusion["layer"] == -3


def test_the_default_is_the_layer_before_the_last_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert augment(tiny_llama(), IMAGE_DIM, IMAGES).config.fusion["layer"] == -2


def test_a_layer_that_nobody_asked_for_need_not_run_on_images():
    def broken(model, layer):
        attention = decoder_layers(model)[layer].self_attn
        own = attention.forward

        @functools.wraps(own)
        def forward(hidden_states, *args, **kwargs):
            if hidden_states.shape[1] < 8:
                raise RuntimeError("not on images")
            return own(hidden_states, *args, **kwargs)

        attention.forward = forward
        return model

    assert augment(broken(tiny_llama(), 0), IMAGE_DIM, IMAGES).config.fusion["layer"] == -2

    with pytest.raises(ValmError, match=r"layers that compute their own: 1$"):
        augment(broken(tiny("gemma3n_text"), 0), IMAGE_DIM, IMAGES, -1)


def test_the_only_layer_is_the_fusion_layer():
    with pytest.warns(UserWarning, match="the model has one layer, so layer -1 is the fusion layer"):
        augment(tiny_gpt2(num_hidden_layers=1), IMAGE_DIM, IMAGES)


def tiny_gpt2_of(n_positions):
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=n_positions)).eval()


def test_models_of_few_positions():
    for n_positions in (2, 5):
        model = augment(tiny_gpt2_of(n_positions), IMAGE_DIM, IMAGES)
        assert len(LimitedSoftmax(model, [{"input_ids": [3, 5]}]).tokens) == 2
    with pytest.raises(ValmError, match="GPT2LMHeadModel reads texts of 1 token: it must read at least 2"):
        augment(tiny_gpt2_of(1), IMAGE_DIM, IMAGES)


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_a_model_in_training_mode_is_augmented_as_in_eval_mode(base):
    """Dropout made the check fail, with the reason that the attention was another."""
    arguments = {"attention_dropout": 0.5} if base is tiny_llama else {"attn_pdrop": 0.5, "embd_pdrop": 0.5}
    model = base(**arguments).train()
    first = decoder_layers(model)[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    augment(model, IMAGE_DIM, IMAGES)
    assert not any(module.training for module in first.modules())
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    for refused, message in (
        ({"layer": 9}, "layer must be one of the 3 layers"),
        ({"logit_bias": float("nan")}, "logit_bias must be a finite number, got nan"),
    ):
        model = base(**arguments).train()
        with pytest.raises(ValmError, match=message):
            augment(model, IMAGE_DIM, IMAGES, **refused)
        assert all(module.training for module in model.modules())


def test_encoders_are_refused_and_decoders_of_their_classes_are_not():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValmError, match="BertSelfAttention is not causal: only decoders can be augmented"):
        augment(encoder, IMAGE_DIM, IMAGES)
    decoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=32, is_decoder=True, add_cross_attention=True))
    assert augment(decoder, IMAGE_DIM, IMAGES).config.fusion["layer"] == -2


def test_a_mask_makes_an_attention_causal():
    """BigBirdPegasus says nothing of it in the attention itself; its model gives it a mask in every call."""
    model = tiny("bigbird_pegasus")
    assert not decoder_layers(model)[-2].self_attn.is_causal
    assert augment(model, IMAGE_DIM, IMAGES).config.fusion["layer"] == -2


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v32", r"DeepseekV32Attention selects the tokens that each token attends to \(sparse attention\)"),
        ("hy_v4", r"HYV4Attention selects the tokens that each token attends to \(sparse attention\)"),
        ("zaya", "ZayaAttention reads an attention mask of type dict, expected a tensor$"),
    ],
)
def test_a_refusal_says_what_the_family_does(family, reason):
    with pytest.raises(ValmError, match=reason):
        augment(tiny(family), IMAGE_DIM, IMAGES)


def test_the_attention_over_an_encoder_is_none_of_the_texts():
    assert attention_path(tiny("bart"), -2) == "self_attn"
    assert attention_path(tiny("bigbird_pegasus"), -2) == "self_attn"
    with pytest.raises(ValmError, match="layer -2 of LongcatFlashForCausalLM has 2 attentions"):
        augment(tiny("longcat_flash"), IMAGE_DIM, IMAGES)


def test_what_changes_keys_from_some_position_on_is_refused(monkeypatch):
    """One vector for each image cannot be at every position. The first eight positions show nothing of it."""
    own = modeling_ministral3.apply_rotary_pos_emb

    def scaling_far_keys(query, key, cos, sin, **more):
        query, key = own(query, key, cos, sin, **more)
        far = sin[..., -1].abs() > 3e-5  # of the slowest rotation; (B, T)
        return query, key * (1 + far[:, None, :, None])

    model = tiny("ministral3")
    monkeypatch.setattr(modeling_ministral3, "apply_rotary_pos_emb", scaling_far_keys)
    with pytest.raises(ValmError, match="Ministral3Attention computes something else at position 255"):
        augment(model, IMAGE_DIM, IMAGES)
    assert type(decoder_layers(model)[-2].self_attn) is modeling_ministral3.Ministral3Attention
