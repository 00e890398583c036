import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from tests.checks.families import tiny
from tests.valm.model.decoders import augmented, random_ids, random_images, tiny_gpt2, tiny_llama
from tests.valm.models import tiny_model
from valm import load, load_adapter, save_adapter
from valm.errors import ValmError
from valm.model.adapter import adapter_base
from valm.model.augment import augment, fusion_module
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever


def logits(model, **scores):
    return model(random_ids(2, 9), **random_images(2, 9), **scores).logits


@pytest.fixture
def base_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def on_base(base_folder, **arguments):
    """The augmented model of `base_folder`, which knows where that is."""
    model = augmented(lambda seed: AutoModelForCausalLM.from_pretrained(base_folder), **arguments)
    return model.eval()


@pytest.mark.parametrize("make", [augmented, partial(augmented, tiny_gpt2), tiny_model])
def test_a_whole_folder_opens_as_it_was(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "valm" and config["base_config"]["model_type"] == model.config.model_type
    assert "auto_map" not in json.dumps(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == config
    assert AutoConfig.from_pretrained(tmp_path).fusion == model.config.fusion


@pytest.mark.parametrize("model", [augmented, tiny_model])
def test_a_config_is_written_in_full(model):
    config = model().config
    full = json.loads(config.to_json_string(use_diff=False))
    assert full.items() >= json.loads(json.dumps(config.to_dict())).items()
    assert "transformers_weights" in config.to_json_string() and "transformers_weights" not in config.to_dict()


@pytest.mark.slow  # a process that imports torch
@pytest.mark.parametrize(
    "door, message", [("AutoModelForCausalLM", "`valm`"), ("LlamaForCausalLM", "this model takes images")]
)
def test_without_valm_a_whole_folder_fails_by_name(tmp_path, door, message):
    augmented().save_pretrained(tmp_path)
    code = f"from transformers import {door} as door; door.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and message in run.stderr


NO_CLASS = "has no causal language model"


@pytest.mark.parametrize(
    "damage, message",
    [
        (None, "no base_config and fusion"),
        ({"fusion": {}}, "the config's fusion does not fit"),
        ({"image_dim": 0}, "the config's fusion does not fit: image_dim must be at least 1, got 0"),
        ({"architecture": "os"}, NO_CLASS),
        ({"architecture": "Trainer"}, NO_CLASS),
        ({"architecture": "BertModel"}, NO_CLASS),
        ({"architecture": "no such"}, NO_CLASS),
    ],
)
def test_a_damaged_config_is_named(tmp_path, damage, message):
    augmented().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"fusion": None if damage is None else config["fusion"] | damage}))
    with pytest.raises(ValmError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_an_adapter_is_small_and_opens_on_its_base(tmp_path, base_folder):
    model = on_base(base_folder)
    with torch.no_grad():
        fusion_module(model).logit_bias_delta.fill_(0.75)
    save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    names = set(load_file(tmp_path / "adapter" / "image_fusion.safetensors"))
    assert all("image_fusion." in name for name in names)
    adapter = load_adapter(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "adapter")
    for loaded in (adapter, AutoModelForCausalLM.from_pretrained(tmp_path / "whole")):
        assert torch.equal(logits(loaded), logits(model))
        assert (fusion_module(loaded).logit_bias_delta == 0.75).all()


def test_a_whole_model_takes_the_place_of_an_adapter(tmp_path, base_folder):
    model = on_base(base_folder)
    save_adapter(model, tmp_path / "model")
    with torch.no_grad():
        fusion_module(model).logit_bias_delta += 1
    model.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("image_fusion.*"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()), logits(model))


def test_an_adapter_takes_no_place_of_a_whole_model(tmp_path, base_folder):
    model = on_base(base_folder)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValmError, match="contains a whole model, which transformers would load instead"):
        save_adapter(model, tmp_path / "model")
    save_adapter(model, base_folder)  # beside its base


def test_a_base_stays_known_wherever_the_process_works_later(tmp_path, base_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = on_base("base")
    model.save_pretrained("whole")
    whole = AutoModelForCausalLM.from_pretrained("whole")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    save_adapter(model, "adapter")
    assert json.loads(Path("adapter/image_fusion.json").read_text())["base"] is None
    assert json.loads(Path("adapter/_retrieval.json").read_text()) == {"base": "../../base"}
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(adapter_base("adapter")), "adapter")
    assert torch.equal(logits(loaded), logits(model))
    whole.save_pretrained("again")
    assert "base_model" not in Path("again/README.md").read_text()
    assert "whole" not in Path("again/config.json").read_text()


def test_load_finds_base_tokenizer_and_images_of_an_adapter(tmp_path, clip, make_kb):
    kb = make_kb(5)
    clip.save(tmp_path / "clip")
    tiny_llama(vocab_size=len(clip.tokenizer) + 5).save_pretrained(tmp_path / "base")
    clip.tokenizer.save_pretrained(tmp_path / "base")
    model = augment(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), kb.dim, 2, logit_bias=1.0).eval()
    model.set_retriever(Retriever(ContextEncoder(clip), kb, 2))
    ids = clip.tokenizer("a red apple", return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "_retrieval.json").read_text())["base"] == "../base"
    loaded, tokenizer = load(tmp_path / "adapter", clip=str(tmp_path / "clip"))
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert len(tokenizer) == len(clip.tokenizer)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValmError, match=r"the base model .* cannot be read: .*; put it back, .* or note where it is"):
        load(tmp_path / "adapter")
    loaded, _ = load(tmp_path / "adapter", base=tmp_path / "elsewhere", clip=str(tmp_path / "clip"))
    torch.testing.assert_close(loaded(ids).logits, expected)
    save_adapter(loaded, tmp_path / "adapter")  # as the sentence says
    torch.testing.assert_close(load(tmp_path / "adapter", clip=str(tmp_path / "clip"))[0](ids).logits, expected)
    with pytest.raises(ValmError, match="is no adapter"):
        load(tmp_path / "elsewhere", base=tmp_path / "elsewhere")


def test_an_adapter_of_another_base_is_refused(tmp_path, base_folder):
    save_adapter(on_base(base_folder), tmp_path)
    with pytest.raises(ValmError, match=r"belongs to another base model .*: .*\.weight has other values"):
        load_adapter(tiny_llama(seed=1), tmp_path)
    with pytest.raises(ValmError, match="belongs to a LlamaForCausalLM, but the base model is a GPT2LMHeadModel"):
        load_adapter(tiny_gpt2(), tmp_path)
    with pytest.raises(ValmError, match="is no adapter: it contains no"):
        load_adapter(tiny_llama(), base_folder)


def change(model, name):
    """By a change of rank 1, as a merged LoRA makes it."""
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight += 0.1 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    return model


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
def test_an_adapter_drops_no_change_of_the_base(tmp_path, base_folder, name):
    model = on_base(base_folder)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValmError, match=f"belongs to another base model .*: {name} has other values"):
        load_adapter(change(AutoModelForCausalLM.from_pretrained(base_folder), name), tmp_path / "adapter")
    changed = change(load_adapter(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "adapter"), name)
    changed.save_pretrained(tmp_path / "whole")
    for other in (change(model, name), changed, AutoModelForCausalLM.from_pretrained(tmp_path / "whole")):
        with pytest.raises(ValmError, match=f"{name} has changed .* save_pretrained"):
            save_adapter(other, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_a_base_that_differs_in_one_row_is_refused(tmp_path, base_folder, dtype):
    """As of a token that was trained, or that the base's own save changes."""
    save_adapter(on_base(base_folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    base.get_input_embeddings().weight.data[0] = 0
    with pytest.raises(ValmError, match=r"another base model than .*: model\.embed_tokens\.weight has other values$"):
        load_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_opens_on_its_base_in_another_precision(tmp_path, base_folder, dtype):
    save_adapter(on_base(base_folder).to(dtype), tmp_path / "adapter")
    half = load_adapter(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype), tmp_path / "adapter")
    assert fusion_module(half).k_bias.dtype == dtype
    save_adapter(half, tmp_path / "of-half")
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).save_pretrained(tmp_path / "half")
    for base in (base_folder, tmp_path / "half"):
        wide = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "of-half")
        save_adapter(wide, tmp_path / "of-wide")  # exact, although the file has the sketch of the half


def test_a_base_with_a_tensor_more_or_less_is_another(tmp_path):
    model = augmented()
    save_adapter(model, tmp_path)
    base = tiny_llama()
    base.model.register_buffer("added", torch.ones(1))
    with pytest.raises(ValmError, match=r"model\.added is no tensor of that base"):
        load_adapter(base, tmp_path)
    del model.model.norm.weight
    with pytest.raises(ValmError, match=r"model\.norm\.weight is gone since the model was augmented"):
        save_adapter(model, tmp_path)
    base = tiny_llama()
    del base.model.norm.weight
    with pytest.raises(ValmError, match=r"model\.norm\.weight is missing"):
        load_adapter(base, tmp_path)


def test_an_adapter_of_a_model_opened_from_a_whole_folder_names_no_base(tmp_path, base_folder):
    model = on_base(base_folder)
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    save_adapter(whole, tmp_path / "adapter")
    with pytest.raises(ValmError, match="does not name its base model"):
        load(tmp_path / "adapter")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValmError, match="already takes images: give its base model"):
        load_adapter(whole, tmp_path / "adapter")


def test_a_damaged_adapter_is_named(tmp_path):
    save_adapter(augmented(), tmp_path)
    description = json.loads((tmp_path / "image_fusion.json").read_text())
    weights = tmp_path / "image_fusion.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    with pytest.raises(ValmError, match=r"image_fusion\.safetensors cannot be read"):
        load_adapter(tiny_llama(), tmp_path)
    save_file({k: v for k, v in load_tensors(whole).items() if not k.endswith("k_bias")}, weights)
    with pytest.raises(ValmError, match=r"k_bias in .* has shape None, expected \(2, 8\)"):
        load_adapter(tiny_llama(), tmp_path)
    fusion = description["fusion"]
    for change, message in (
        ({"format_version": 9}, "format_version 9, expected 3"),
        ({"fusion": {"layer": -2}}, "fusion.architecture: Field required"),
        ({"fusion": fusion | {"image_dim": 0}}, r"image_fusion\.json .*image_dim must be at least 1, got 0.*save"),
        ({"fusion": fusion | {"sketch": {}}}, r"to another base model .*: lm_head\.weight is no tensor of that base"),
    ):
        (tmp_path / "image_fusion.json").write_text(json.dumps(description | change))
        with pytest.raises(ValmError, match=message):
            load_adapter(tiny_llama(), tmp_path)


def test_an_adapter_that_fails_leaves_its_base_for_the_next(tmp_path):
    """Whatever of it is damaged."""
    model = augmented()
    save_adapter(model, tmp_path)
    base, fused = tiny_llama(), tmp_path / "image_fusion.json"
    whole = json.loads(fused.read_text())
    (tmp_path / "_retrieval.json").write_text("[]")
    for damage in ({"fusion": {}}, {"retrieval": {"index": 1}}, {"retrieval": {"query": "eot"}}):
        fused.write_text(json.dumps(whole | damage))
        for _ in range(2):
            with pytest.raises(ValmError, match=r"does not describe an adapter|retrieval does not fit|is damaged"):
                load_adapter(base, tmp_path)
        assert type(base) is LlamaForCausalLM and base.state_dict().keys() == tiny_llama().state_dict().keys()
    fused.write_text(json.dumps(whole))
    (tmp_path / "_retrieval.json").unlink()
    assert torch.equal(logits(load_adapter(base, tmp_path)), logits(model))


# the doors of transformers, none of which may open a model with images as one without
OF_LLAMA = [LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification]
AUTO = [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]


@pytest.mark.parametrize(
    "make, doors",
    [
        (augmented, OF_LLAMA + AUTO),
        (tiny_model, [GPT2LMHeadModel]),
        pytest.param(tiny_model, [AutoModel], marks=pytest.mark.slow),  # its error imports every family
    ],
)
def test_another_class_does_not_open_a_whole_folder_without_its_images(tmp_path, make, doors):
    make().save_pretrained(tmp_path)
    for door in doors:
        with pytest.raises(ValueError, match=r"this model takes images.*valm\.load|Unrecognized configuration class"):
            door.from_pretrained(tmp_path)


@pytest.mark.parametrize("sharded", [{}, {"max_shard_size": "20KB"}])
def test_a_whole_folder_opens_by_its_own_classes(tmp_path, sharded):
    model = augmented()
    model.save_pretrained(tmp_path, **sharded)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(sharded)
    config = type(model.config).from_pretrained(pretrained_model_name_or_path=tmp_path)
    for opened in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config),
        type(model).from_pretrained(tmp_path),
        type(model).from_pretrained(pretrained_model_name_or_path=tmp_path),
        type(model).from_pretrained(tmp_path, config=model.config, dtype=torch.float32),
        type(model).from_pretrained(tmp_path, use_cache=False),
    ):
        assert type(opened) is type(model) and opened.config.fusion == model.config.fusion
        assert torch.equal(logits(opened), logits(model))
    assert not opened.config.use_cache
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and logits(half).isfinite().all()
    opened.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="this model takes images"):
        LlamaForCausalLM.from_pretrained(tmp_path / "again", config=opened.config)


@pytest.mark.parametrize("family", ["exaone", "sarvam_moe"])
def test_a_config_of_its_own_with_another_familys_model_class_opens(tmp_path, family):
    base = tiny(family)
    own, its_models = type(base.config), type(base).config_class
    assert own is not its_models
    model = augmented(lambda seed: base)
    model.save_pretrained(tmp_path / "whole")
    pickled = pickle.loads(pickle.dumps(model))
    doors = (AutoModelForCausalLM, type(model))
    for opened in (*(door.from_pretrained(tmp_path / "whole") for door in doors), pickled):
        assert type(opened) is type(model) and isinstance(opened.config, own)
        assert torch.equal(logits(opened), logits(model))
    if its_models is LlamaConfig:  # a Llama in the same process keeps a class of its own
        llama = augmented()
        assert type(llama) is not type(model) and isinstance(llama, LlamaForCausalLM)
        with pytest.raises(ValmError, match="contains the config of a exaone, expected an augmented llama"):
            type(llama).from_pretrained(tmp_path / "whole")


def test_an_augmented_class_opens_no_other_model(tmp_path):
    model = augmented()
    tiny_llama().save_pretrained(tmp_path / "plain")
    augmented(tiny_gpt2).save_pretrained(tmp_path / "gpt2")
    for name in ("plain", "gpt2"):
        with pytest.raises(ValmError, match=f"{name} (is|contains) the config of a .*, expected an augmented llama"):
            type(model).from_pretrained(tmp_path / name)


@torch.no_grad()
def test_what_is_loaded_with_a_device_map(tmp_path, base_folder):
    """The adapter of an offloaded base is an error, and its base stays as it was."""
    model = on_base(base_folder)
    save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    names = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {f"model.{name}": "cpu" for name in names} | {"model.layers.2": "disk", "lm_head": "cpu"}
    offloaded = {"device_map": places, "offload_folder": tmp_path / "offload"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **offloaded)
    assert torch.equal(logits(whole), logits(model))
    base = AutoModelForCausalLM.from_pretrained(base_folder, **offloaded)
    with pytest.raises(ValmError, match=r"^weights of this LlamaForCausalLM are offloaded: .* before dispatch_model"):
        load_adapter(base, tmp_path / "adapter")
    ids = random_ids(2, 9)
    assert type(base) is LlamaForCausalLM and torch.equal(base(ids).logits, tiny_llama()(ids).logits)
