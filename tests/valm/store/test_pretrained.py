"""What transformers opens for valm: no code of others, nothing outside the folder, no sizes that the weights lack."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.valm.model.decoders import HEADS, SIZES, SMALL, augmented, tiny_gpt2, tiny_llama
from tests.valm.models import tiny_model
from valm import load, save_adapter
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, load_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.evaluation.scorers import open_scorer
from valm.model.checkpoint import load_decoder
from valm.store import pretrained
from valm.store.pretrained import from_pretrained, gguf_option, library_errors

PACKAGE = Path(__file__).parents[3] / "valm"
TOKENIZER = prune_tokenizer(clip_tokenizer(), ["the sea is blue"])
# Functions that run what a repository brings along, unless they are told not to.
OPENERS = {"from_pretrained", "from_config", "load_dataset", "pipeline"}


def calls_of_openers():
    """Each call of one of OPENERS in the package, and whether it is told not to run code. `from_pretrained` of our own
    classes hands on the arguments that it was called with."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        handed_on = {
            call
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "from_pretrained"
            for call in ast.walk(function)
        }
        for call in ast.walk(tree):
            name = getattr(call.func, "attr", getattr(call.func, "id", "")) if isinstance(call, ast.Call) else ""
            by_name = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and name == "from_pretrained"
            if (
                name in OPENERS and call not in handed_on and not by_name
            ):  # by its name alone it is valm.store.pretrained's
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                off = given.get("trust_remote_code")
                yield f"{file.relative_to(PACKAGE)}:{call.lineno}", isinstance(off, ast.Constant) and off.value is False


def test_every_call_says_that_no_code_is_run():
    calls = dict(calls_of_openers())
    assert len(calls) >= 4
    assert [place for place, off in calls.items() if not off] == []


@pytest.fixture
def code_base(tmp_path, monkeypatch):
    """A Llama and a tokenizer whose files say that only their own code opens them, and a user who would say yes."""
    folder, ran = tmp_path / "base", tmp_path / "ran"
    tiny_llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "own.py").write_text(f"open({os.fspath(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForMaskedLM")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *shown: asked.append(shown) or "y")
    yield folder
    assert asked == [] and not ran.exists()


def save_adapter_on(folder, out):
    tiny_llama().save_pretrained(folder.parent / "good")
    model = augmented(lambda seed: AutoModelForCausalLM.from_pretrained(folder.parent / "good"))
    model.config.name_or_path = os.fspath(folder)
    return save_adapter(model, out)


@pytest.mark.parametrize("door", ["adapter", "decoder", "tokenizer", "evaluation"])
def test_code_of_others_is_neither_run_nor_asked_for(code_base, tmp_path, door):
    doors = {
        "adapter": lambda: load(save_adapter_on(code_base, tmp_path / "adapter")),
        "decoder": lambda: load_decoder(code_base),
        "tokenizer": lambda: load_tokenizer(code_base),
        "evaluation": lambda: open_scorer(str(code_base)),
    }
    with pytest.raises(ValmError, match=r"base.* needs code of its own \(auto_map\), which is not run") as raised:
        doors[door]()
    assert "\n" not in str(raised.value)


@pytest.fixture
def sharded(tmp_path):
    """A Llama in shards, with an index of them."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    TOKENIZER.save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    return index


def rename_shard(index, new):
    found = json.loads(index.read_text())
    first = sorted(found["weight_map"].values())[0]
    found["weight_map"] = {key: new if name == first else name for key, name in found["weight_map"].items()}
    index.write_text(json.dumps(found))
    return index.parent / first


OPENED = {"decoder": load_decoder, "evaluation": lambda folder: open_scorer(os.fspath(folder))}


@pytest.mark.parametrize("door", OPENED)
@pytest.mark.parametrize("absolute", [False, True])
def test_shards_outside_of_the_folder_are_not_read(sharded, tmp_path, absolute, door):
    OPENED[door](sharded.parent)
    outside = tmp_path / "outside.safetensors"
    rename_shard(sharded, str(outside) if absolute else "../outside.safetensors").rename(outside)
    with pytest.raises(ValmError, match=r"model\.safetensors\.index\.json names .*, which leads out of its folder"):
        OPENED[door](sharded.parent)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("door", OPENED)
@pytest.mark.parametrize("place", ["model.pipe", "more/model.pipe", "additional_chat_templates/a.jinja"])
def test_pipes_below_the_folder_are_refused(sharded, place, door):
    pipe = sharded.parent / place
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    if place.endswith(".pipe"):
        rename_shard(sharded, place)
    with pytest.raises(ValmError, match=rf"{place} is a pipe, not a file"):
        OPENED[door](sharded.parent)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2, tiny_model])
@pytest.mark.parametrize("size", ["layers", "vocab_size", "width", "positions"])
def test_sizes_that_the_weights_lack_are_refused(tmp_path, model, size):
    """Before anything of these sizes is made: a list of 10**9 layers has 8 GB."""
    model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"layers": ("num_hidden_layers", "n_layer"), "width": ("hidden_size", "n_embd"), "vocab_size": [size]}
    names["positions"] = ("n_positions",)
    (name,) = [name for name in names[size] if name in config] or pytest.skip("has no table of positions")
    (tmp_path / "config.json").write_text(json.dumps(config | {name: 10**9}))
    opening = load if model is tiny_model else load_decoder
    with pytest.raises(
        ValmError,
        match=r"config\.json describes (.*its weights (allow|have only)|no model)|n_embd must be n_head times",
    ):
        opening(tmp_path)


@pytest.mark.timeout(60)
def test_layers_in_a_part_of_the_config_are_counted(tmp_path):
    augmented().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base_config"]["num_hidden_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValmError, match=r"base_config\.num_hidden_layers is 1000000000, .*its weights allow"):
        load(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part, name", [("text_cfg", "layers"), ("vision_cfg", "layers"), ("text_cfg", "width")])
def test_sizes_of_a_clip_that_its_weights_lack_are_refused(tmp_path, clip, part, name):
    clip.save(tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][part][name] = 10**9
    file.write_text(json.dumps(config))
    with pytest.raises(ValmError, match=rf"{part}\.{name} is 1000000000, .*its weights allow"):
        Clip.load(tmp_path)


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def as_pytorch(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def beside_others(folder):
    """What a Trainer leaves in the folder: pickles, and a checkpoint that has more weights than the model."""
    torch.save({}, folder / "training_args.bin")
    (folder / "checkpoint-1").mkdir()
    torch.save({}, folder / "checkpoint-1" / "optimizer.pt")
    others = {str(number): torch.zeros(1) for number in range(2000)}
    save_file(others, folder / "checkpoint-1" / "model.safetensors")


def named(folder):
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    set_config(folder, transformers_weights="own.safetensors")


def tiny_gpt_neo():
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    return GPTNeoForCausalLM(GPTNeoConfig(**SMALL, **sizes))


HUGE = {
    "num_hidden_layers": (tiny_llama, 1900),
    "vocab_size": (tiny_llama, 10**9),
    "num_labels": (tiny_llama, 10**9),
    "attention_types": (tiny_gpt_neo, [[["global", "local"], 10**9]]),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stored", [as_pytorch, beside_others, named])
@pytest.mark.parametrize("key", HUGE)
def test_sizes_are_compared_with_the_weights_that_are_loaded(tmp_path, key, stored):
    model, huge = HUGE[key]
    model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    stored(tmp_path)
    load_decoder(tmp_path)
    set_config(tmp_path, **{key: huge})
    with pytest.raises(ValmError, match=r"config\.json describes .*its weights (allow|have only)"):
        load_decoder(tmp_path)


def test_weights_that_the_config_names_elsewhere_are_not_read(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    set_config(tmp_path / "base", transformers_weights="../outside.safetensors")
    with pytest.raises(ValmError, match=r"config\.json names .*outside\.safetensors.*leads out of its folder"):
        load_decoder(tmp_path / "base")


def test_bounds_are_no_numbers_of_layers(tmp_path):
    """Qwen2's max_window_layers is 28 however few its layers are."""
    config = Qwen2Config(**SMALL, **SIZES | {"num_hidden_layers": 1}, **HEADS)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert load_decoder(tmp_path).config.max_window_layers == 28


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_want_of_memory_does_not_blame_the_file(error):
    with pytest.raises(type(error)) as raised, library_errors("the model x"):
        raise error
    assert raised.value is error
    with pytest.raises(ValmError, match="the model x cannot be read: odd"), library_errors("the model x"):
        raise RuntimeError("odd")


def test_a_model_of_one_weight_in_two_places_fits(tmp_path):
    """Tied weights are stored once, in any precision."""
    model = tiny_gpt2()
    model.bfloat16().save_pretrained(tmp_path)
    assert load_decoder(tmp_path).dtype == torch.float32
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "ln_f.bias" not in name}, tmp_path / "w.safetensors")
    os.replace(tmp_path / "w.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValmError, match=r"has no weights for transformer\.ln_f\.bias"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "./none", "none/", "{tmp}/none"])
def test_what_no_hub_can_have_is_a_folder_that_is_missing(name, tmp_path, caplog):
    name = name.format(tmp=tmp_path)
    with pytest.raises(ValmError, match=f"^the base model {name} cannot be read: there is no folder {name}$"):
        load_decoder(name)
    assert not caplog.records


def test_a_missing_folder_is_said_before_the_hub_is_asked(monkeypatch, caplog):
    def offline(*args, **kwargs):
        assert caplog.messages == ["there is no folder nosuchdir: looking for it on the Hugging Face Hub"]
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ValmError, match="cannot be read: there is no folder nosuchdir, and We couldn't connect to"):
        load_decoder("nosuchdir")


def test_where_nothing_is_downloaded_the_hub_is_not_blamed(caplog):
    with pytest.raises(ValmError, match="cannot be read: there is no folder nosuchdir, and it is not in the cache of"):
        from_pretrained(AutoModelForCausalLM, "nosuchdir", "the model nosuchdir", local_files_only=True)
    assert not caplog.records


@pytest.mark.parametrize(
    "source, folder, file",
    [
        ("{tmp}/model.gguf", "{tmp}", "model.gguf"),
        ("model.gguf", ".", "model.gguf"),
        ("maker/model/file.gguf", "maker/model", "file.gguf"),
        ("{tmp}/folder.gguf", "{tmp}/folder.gguf", None),
        ("{tmp}", "{tmp}", None),
    ],
)
def test_a_gguf_file_is_an_option(tmp_path, source, folder, file):
    (tmp_path / "folder.gguf").mkdir()
    expected = {} if file is None else {"gguf_file": file}
    assert gguf_option(source.format(tmp=tmp_path)) == (folder.format(tmp=tmp_path), expected)


def test_a_gguf_file_of_the_hub_may_be_cached_alone(monkeypatch):
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda name, file: file if file == "file.gguf" else None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: (args, options))
    args, options = from_pretrained(
        AutoModelForCausalLM, "maker/model", "it", gguf_file="file.gguf", local_files_only=True
    )
    assert args == ("maker/model",) and options["gguf_file"] == "file.gguf" and not options["trust_remote_code"]
    with pytest.raises(ValmError, match="is not in the cache"):
        from_pretrained(AutoModelForCausalLM, "maker/model", "it", local_files_only=True)
