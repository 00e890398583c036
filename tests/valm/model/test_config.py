import json

import pytest
from transformers import AutoConfig, LlamaConfig

from tests.valm.model.decoders import augmented
from valm.errors import ValmError
from valm.model.config import FusionOptions, ValmConfig


def test_save_and_load_keep_every_value(tmp_path):
    fusion = {"image_dim": 12, "num_images": 1, "blind": True, "fusion_scale": "embed_dim", "min_score": 0.5}
    config = ValmConfig(n_embd=64, n_head=4, n_layer=3, **fusion)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ValmConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_configs_are_read_by_the_argument_names_of_transformers(tmp_path):
    for config in (LlamaConfig(num_hidden_layers=3), ValmConfig(n_layer=3)):
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(pretrained_model_name_or_path=tmp_path).num_hidden_layers == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layer": 12}, "layer must name one of the 12 blocks"),
        ({"num_image": 0}, r"ValmConfig has no argument num_image, did you mean num_images\?"),
        ({"n_layers": 2}, r"ValmConfig has no argument n_layers, did you mean n_layer\?"),
        ({"max_length": 20}, r"ValmConfig has no argument max_length"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ValmConfig(**arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_dim": 0}, "image_dim must be at least 1, got 0"),
        ({"num_images": 65}, "num_images must be from 0 to 64, got 65"),
        ({"num_images": 10**12}, "num_images must be from 0 to 64"),
        ({"num_images": -1}, "num_images must be from 0 to 64"),
        ({"blind": True}, "blind needs num_images = 1"),
        ({"fusion_scale": "none"}, "fusion_scale must be one of"),
        ({"logit_bias": float("nan")}, "logit_bias must be a finite number, got nan"),
        ({"min_score": float("inf")}, "min_score must be a finite number, got inf"),
        ({"min_score": "1"}, "min_score must be a finite number, got '1'"),
        ({"min_score": True}, "min_score must be a finite number, got True"),
        ({"min_score": float("nan")}, "min_score must be a finite number, got nan"),  # which would cut nothing
        ({"min_score": 0.5, "num_images": 0}, "min_score is for a model that sees images, but num_images is 0"),
    ],
)
def test_impossible_options_of_the_fusion_are_refused(options, message):
    with pytest.raises(ValmError, match=message):
        FusionOptions(**ValmConfig().fusion | options)


def test_every_argument_of_gpt2_is_one():
    config = ValmConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, attn_implementation="eager")
    assert (config.n_embd, config.n_layer, config.n_head, config._attn_implementation) == (64, 3, 4, "eager")
    ValmConfig(torch_dtype="float16", num_labels=3, output_attentions=False, name_or_path="here")


def test_a_file_may_have_names_of_other_versions(tmp_path):
    """As the file of the published GPT-2 has n_ctx and task_specific_params."""
    ValmConfig(n_layer=3).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["base_config"] |= {"n_ctx": 1024, "transformers_version": "4.30.0"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for config in (AutoConfig.from_pretrained(tmp_path), ValmConfig.from_pretrained(tmp_path)):
        assert isinstance(config, ValmConfig) and (config.n_ctx, config.n_layer) == (1024, 3)


def test_the_config_of_the_base_is_the_same_in_memory_and_read_from_a_file(tmp_path):
    """Hidden states of a training are known by it."""
    model = augmented()
    model.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.architectures == ["AugmentedLlamaForCausalLM"]  # TRL looks for a class of this name
    read.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == read.to_diff_dict()
    assert read.to_diff_dict()["base_config"]["architectures"] == ["LlamaForCausalLM"]
