import json

import pytest
from transformers import AutoConfig

from valm.model.config import ValmConfig


def test_save_and_load_keep_every_value(tmp_path):
    config = ValmConfig(
        n_embd=64,
        n_head=4,
        n_layer=3,
        image_dim=12,
        num_images=1,
        blind=True,
        fusion_scale="embed_dim",
        image_score_scale_init=0.5,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ValmConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize("layer, index", [(-2, 10), (0, 0), (11, 11), (-12, 0)])
def test_fusion_layer_counts_from_both_ends(layer, index):
    assert ValmConfig(fusion_layer=layer).fusion_index == index


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"fusion_layer": 12}, "fusion_layer must name one of the 12 blocks"),
        ({"fusion_scale": "none"}, "fusion_scale must be one of"),
        ({"num_images": 65}, "num_images must be from 0 to 64"),
        ({"num_images": -1}, "num_images must be from 0 to 64"),
        ({"image_dim": 0}, "image_dim must be at least 1"),
        ({"blind": True}, "blind needs num_images = 1"),
        ({"image_score_scale_init": float("inf")}, "image_score_scale_init must be a finite number or None, got inf"),
        ({"image_score_scale_init": "1"}, "image_score_scale_init must be a finite number or None, got '1'"),
        ({"image_score_scale_init": True}, "image_score_scale_init must be a finite number or None, got True"),
        ({"image_score_scale_init": 1.0, "num_images": 0}, "with num_images = 0 there are none: set it to None"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"n_embd": 100, "n_head": 3}, "n_embd must be n_head times"),
        ({"num_image": 0}, r"ValmConfig has no argument num_image, did you mean num_images\?"),
        ({"n_layers": 2}, r"ValmConfig has no argument n_layers, did you mean n_layer\?"),
        ({"max_length": 20}, r"ValmConfig has no argument max_length"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ValmConfig(**arguments)


def test_every_argument_of_gpt2_is_one():
    config = ValmConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, attn_implementation="eager")
    assert (config.n_embd, config.n_layer, config.n_head, config._attn_implementation) == (64, 3, 4, "eager")
    ValmConfig(torch_dtype="float16", num_labels=3, output_attentions=False, name_or_path="here")
    assert ValmConfig(**config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="no argument num_image"):
        AutoConfig.for_model("valm", num_image=0)


@pytest.mark.parametrize("version", [{}, {"transformers_version": "4.30.0"}])
def test_a_file_may_have_names_of_other_versions(tmp_path, version):
    """As the file of the published GPT-2 has n_ctx and task_specific_params."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "valm", "n_ctx": 1024, "n_layer": 3, **version}))
    for config in (
        AutoConfig.from_pretrained(tmp_path),
        ValmConfig.from_pretrained(tmp_path, num_images=2),
        ValmConfig.from_json_file(tmp_path / "config.json"),
    ):
        assert (config.n_ctx, config.n_layer) == (1024, 3)
