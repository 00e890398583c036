"""What transformers opens for valm: no code of others, nothing outside the folder, no sizes that the weights lack."""

import ast
import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.valm.model.decoders import augmented, tiny_llama
from valm import load, save_adapter
from valm.clip.tokenizer import clip_tokenizer, load_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.evaluation.scorers import open_scorer
from valm.evaluation.settings import Settings
from valm.model.checkpoint import load_decoder
from valm.store.pretrained import gguf_option, library_errors

PACKAGE = Path(__file__).parents[3] / "valm"
TOKENIZER = prune_tokenizer(clip_tokenizer(), ["the sea is blue"])
# Functions that run what a repository brings along, unless they are told not to.
OPENERS = {"from_pretrained", "from_config", "load_dataset", "pipeline"}


def calls_of_openers():
    """Each call of one of OPENERS in the package, and whether it is told not to run code. `from_pretrained` of our own
    classes hands on the arguments that it was called with."""
    for file in sorted(PACKAGE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        handed_on = {
            call
            for function in nodes
            if isinstance(function, ast.FunctionDef) and function.name == "from_pretrained"
            for call in ast.walk(function)
        }
        for call in nodes:
            if not isinstance(call, ast.Call) or call in handed_on:
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            by_name = isinstance(call.func, ast.Name) and name == "from_pretrained"  # valm.store.pretrained's own
            if name in OPENERS and not by_name:
                off = {keyword.arg: keyword.value for keyword in call.keywords}.get("trust_remote_code")
                yield f"{file.relative_to(PACKAGE)}:{call.lineno}", isinstance(off, ast.Constant) and off.value is False


def test_every_call_says_that_no_code_is_run():
    calls = dict(calls_of_openers())
    assert len(calls) >= 2
    assert [place for place, off in calls.items() if not off] == []


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def code_base(tmp_path, monkeypatch):
    """A Llama and a tokenizer whose files say that only their own code opens them, and a user who would say yes."""
    folder, ran = tmp_path / "base", tmp_path / "ran"
    tiny_llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "own.py").write_text(f"open({os.fspath(ran)!r}, 'w')\n")
    own = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForMaskedLM")}
    edit_json(folder / "config.json", model_type="own", auto_map=own)
    own = {"AutoTokenizer": ["own.Own", "own.Own"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *shown: asked.append(shown) or "y")
    yield folder
    assert asked == [] and not ran.exists()


def save_adapter_on(folder, out):
    tiny_llama().save_pretrained(folder.parent / "good")
    model = augmented(lambda seed: AutoModelForCausalLM.from_pretrained(folder.parent / "good"))
    model.config.base_place = os.fspath(folder)
    return save_adapter(model, out)


@pytest.mark.parametrize("door", ["adapter", "decoder", "tokenizer", "evaluation"])
def test_code_of_others_is_neither_run_nor_asked_for(code_base, tmp_path, door):
    doors = {
        "adapter": lambda: load(save_adapter_on(code_base, tmp_path / "adapter")),
        "decoder": lambda: load_decoder(code_base),
        "tokenizer": lambda: load_tokenizer(code_base),
        "evaluation": lambda: open_scorer(str(code_base), Settings()),
    }
    with pytest.raises(
        ValmError, match=r"base.* needs code of its own \(auto_map\), which valm does not run"
    ) as raised:
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
    shards = json.loads(index.read_text())["weight_map"]
    first = min(shards.values())
    edit_json(index, weight_map={key: new if name == first else name for key, name in shards.items()})
    return index.parent / first


OPENED = {"decoder": load_decoder, "evaluation": lambda folder: open_scorer(os.fspath(folder), Settings())}


@pytest.mark.parametrize("door", OPENED)
@pytest.mark.parametrize("absolute", [False, True])
def test_shards_outside_of_the_folder_are_not_read(sharded, tmp_path, absolute, door):
    OPENED[door](sharded.parent)
    outside = tmp_path / "outside.safetensors"
    rename_shard(sharded, str(outside) if absolute else "../outside.safetensors").rename(outside)
    with pytest.raises(ValmError, match=r"model\.safetensors\.index\.json names .*, which leads out of its folder"):
        OPENED[door](sharded.parent)


def test_weights_that_the_config_names_elsewhere_are_not_read(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", transformers_weights="../outside.safetensors")
    with pytest.raises(ValmError, match=r"config\.json names .*outside\.safetensors.*leads out of its folder"):
        load_decoder(tmp_path / "base")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_want_of_memory_does_not_blame_the_file(error):
    with pytest.raises(type(error)) as raised, library_errors("the model x"):
        raise error
    assert raised.value is error
    with pytest.raises(ValmError, match="the model x cannot be read: odd"), library_errors("the model x"):
        raise RuntimeError("odd")


@pytest.mark.parametrize("name", ["./none", "{tmp}/none"])
def test_what_no_hub_can_have_is_missing(name, tmp_path):
    name = name.format(tmp=tmp_path)
    with pytest.raises(ValmError, match=f"^the base model {name} cannot be read: there is no folder {name}$"):
        load_decoder(name)


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
