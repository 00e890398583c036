"""A saved model's images come by the CLIP and the knowledge base that it was saved with, through every door."""

import json
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from tests.valm.cli.commands import run
from tests.valm.model.decoders import tiny_llama
from tests.valm.models import model_of
from tests.valm.store.manifests import edit_manifest, replacements
from tests.valm.tiny_clip import make_clip
from valm import Clip, ContextEncoder, ImageKnowledgeBase, Retriever, augment, load, save_adapter, save_checkpoint
from valm.clip.tokenizer import prompt_ids
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.copy import merge
from valm.knowledge_base.sources.folder import FolderSource
from valm.retrieval.context import QUERY_SETTINGS
from valm.retrieval.retriever import BlindRetriever, NoImages
from valm.retrieval.source import read_places

OTHER_CLIP = r"saved with the CLIP clip \(SHA-256 \w{12}\), but its images would be found by other \(SHA-256 \w{12}\)"
OTHER_KB = r"saved with the knowledge base .*kb \(SHA-256 \w{12}\), but its images now come from .*\)"


def knowledge_base(root, name, clip_name, colors):
    pictures = root / f"{name}-pictures"
    pictures.mkdir()
    for number, color in enumerate(colors):
        Image.new("RGB", (32, 32), color).save(pictures / f"{number}.png")
    build(FolderSource(pictures), root / name, Clip.load(root / clip_name), progress=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip):
    """kb: the models'. more: another one of the same CLIP. foreign: one of another CLIP, of the same dimension."""
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("clip", 0), ("other", 1)):
        made = make_clip(clip.tokenizer, seed)
        made.name = name
        made.save(root / name)
    knowledge_base(root, "kb", "clip", ["red", "blue", "green"])
    knowledge_base(root, "more", "clip", ["red", "blue", "green", "white"])
    knowledge_base(root, "foreign", "other", ["red", "blue", "green"])
    kb = ImageKnowledgeBase.open(root / "kb")
    encoder = ContextEncoder(kb.load_clip())
    tokenizer = encoder.clip.tokenizer
    for name, blind in (("valm", False), ("blind", True)):
        model = model_of(tokenizer, image_dim=kb.dim, num_images=1, blind=blind)
        model.set_retriever(BlindRetriever(encoder) if blind else Retriever(encoder, kb, 1))
        save_checkpoint(model, tokenizer, root / name)
    base = tiny_llama()
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(root / "base")
    model = augment(AutoModelForCausalLM.from_pretrained(root / "base"), kb.dim, 1, logit_bias=1.0)
    model.set_retriever(Retriever(encoder, kb, 1))
    save_adapter(model, root / "adapter")
    save_checkpoint(model, tokenizer, root / "whole")
    tokenizer.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / "copy")


def retriever(folder, kb_name):
    kb = ImageKnowledgeBase.open(folder / kb_name)
    return Retriever(ContextEncoder(kb.load_clip()), kb, 1)


def identity(folder):
    """What identifies the images of the model in `folder`."""
    file = "image_fusion.json" if (folder / "image_fusion.json").exists() else "config.json"
    return json.loads((folder / file).read_text())["retrieval"]


def set_identity(folder, found):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"retrieval": found}))


def set_places(folder, places):
    (folder / "_retrieval.json").write_text(json.dumps(places))


def rebuild(folder, name):
    """Another knowledge base where kb was."""
    shutil.rmtree(folder / "kb")
    shutil.move(folder / name, folder / "kb")


@pytest.mark.parametrize("name", ["valm", "adapter", "whole"])
def test_a_knowledge_base_of_another_clip_is_refused(world, name):
    with pytest.raises(ValmError, match=f"do not fit: this model was {OTHER_CLIP}"):
        load(world / name, kb=world / "foreign", strict=True)
    model, tokenizer = load(world / name)
    with pytest.raises(ValmError, match=OTHER_CLIP):
        model.set_retriever(retriever(world, "foreign"))
    model(torch.tensor([prompt_ids(tokenizer, "a red apple")]))  # by its own still
    assert model.retriever.kb.path.name == "kb" and model.other_images is None


@pytest.mark.parametrize("name", ["valm", "adapter", "whole"])
def test_another_knowledge_base_of_the_same_clip_is_named(world, name):
    with pytest.warns(UserWarning, match=OTHER_KB) as caught:
        model, _ = load(world / name, kb=world / "more", strict=True)
    assert len(caught) == 1 and str(caught[0].message) == model.other_images
    with pytest.raises(ValmError, match=OTHER_CLIP):  # and so the images are the others still
        model.set_retriever(retriever(world, "foreign"))
    assert str(caught[0].message) == model.other_images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_retriever(retriever(world, "kb"))
        assert model.other_images is None
        model.set_retriever(NoImages(1, model.fusion_options.image_dim))
        model.set_retriever(None)


@pytest.mark.parametrize("name", ["valm", "adapter", "whole"])
def test_a_knowledge_base_rebuilt_in_its_place_is_seen(copy, name):
    rebuild(copy, "more")
    model, tokenizer = load(copy / name, strict=True)
    ids = torch.tensor([prompt_ids(tokenizer, "a red apple")])
    with pytest.warns(UserWarning, match=OTHER_KB):
        model(ids)
    rebuild(copy, "foreign")
    model, _ = load(copy / name, strict=True)
    with pytest.raises(ValmError, match=f"cannot be retrieved: this model was {OTHER_CLIP}"):
        model(ids)


@pytest.mark.parametrize("name, key", [("valm", "knowledge_base"), ("adapter", "knowledge_base"), ("adapter", "base")])
def test_a_name_that_no_folder_has_is_one_sentence(copy, name, key):
    set_places(copy / name, read_places(copy / name) | {key: "x" * 256})
    with pytest.raises((ValmError, OSError), match="File name too long"):
        load(copy / name)


def test_a_blind_model_keeps_its_clip(copy):
    model, tokenizer = load(copy / "blind")
    assert set(identity(copy / "blind")) == {"clip_name", "clip_sha256", "reading_precision", *QUERY_SETTINGS}
    assert read_places(copy / "blind") == {"clip": "../clip"}
    with pytest.raises(ValmError, match=OTHER_CLIP):
        load(copy / "blind", clip=str(copy / "other"))
    with pytest.raises(ValmError, match=OTHER_CLIP):
        model.set_retriever(BlindRetriever(ContextEncoder(Clip.load(copy / "other"))))
    shutil.rmtree(copy / "clip")
    shutil.move(copy / "other", copy / "clip")
    with pytest.raises(ValmError, match=OTHER_CLIP):
        model(torch.tensor([prompt_ids(tokenizer, "a red apple")]))


@pytest.mark.parametrize(
    "command", [["generate", "valm", "a red apple"], ["explain", "valm", "a red apple", "--out", "page.html"]]
)
def test_the_commands_refuse_another_clip_and_name_another_knowledge_base(copy, monkeypatch, capsys, command):
    monkeypatch.chdir(copy)
    assert run(*command, "--kb", "foreign") == 1
    assert "saved with the CLIP clip" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=OTHER_KB):
        assert run(*command, "--kb", "more") == 0
    rebuild(copy, "foreign")
    assert run(*command) == 1
    assert "saved with the CLIP clip" in capsys.readouterr().err


def test_the_evaluations_report_names_another_knowledge_base(copy):
    (copy / "object_color").mkdir()
    table = "Index,Descriptor,Item,Color\n1,a,apple,red\n2,the,sky,blue\n"
    (copy / "object_color" / "memory_color_data.csv").write_text(table)
    asked = ["--tasks", "memory_color", "--data", copy, "--protocol", "fair"]
    assert run("eval", copy / "valm", *asked, "--out", copy / "own") == 0
    assert "saved with" not in (copy / "own" / "results.md").read_text()
    with pytest.warns(UserWarning, match=OTHER_KB):
        assert run("eval", copy / "valm", *asked, "--kb", copy / "more", "--out", copy / "out") == 0
    (line,) = (line for line in (copy / "out" / "results.md").read_text().splitlines() if "saved with" in line)
    assert re.search(OTHER_KB, line.replace("\\", ""))


@pytest.mark.parametrize("found", [{"query": "eot", "clip": 1, "index": "exact"}, {"overlap": 1}, ["eot"]])
def test_a_damaged_identity_is_named(copy, found):
    set_identity(copy / "valm", found)
    with pytest.raises(ValmError, match="the config's entry for retrieval is damaged"):
        load(copy / "valm")


@pytest.mark.parametrize("places", [[], {"knowledge_base": 1}, {"clip": "a\0b"}])
def test_damaged_places_are_named(copy, places):
    set_places(copy / "valm", places)
    with pytest.raises(ValmError, match=r"_retrieval\.json is damaged"):
        load(copy / "valm")


@pytest.mark.parametrize("kind", ["folder", "dead link"])
def test_places_that_are_no_file_are_not_taken_for_none(tmp_path, kind):
    file = tmp_path / "_retrieval.json"
    file.mkdir() if kind == "folder" else file.symlink_to("nowhere")
    with pytest.raises(OSError, match=r"_retrieval\.json"):
        read_places(tmp_path)


@pytest.mark.filterwarnings("ignore:this model was saved with the knowledge base")  # as its manifest is edited
@pytest.mark.timeout(60)
def test_places_that_are_no_regular_file_are_not_opened(tmp_path):
    file = tmp_path / "model" / "_retrieval.json"
    file.parent.mkdir()
    file.write_text("{}")
    for _ in replacements(file, tmp_path / "outside"):
        with pytest.raises(PermissionError, match=r"not a regular file|a link that leads out"):
            read_places(file.parent)


def test_no_clip_is_downloaded_unless_that_is_allowed(copy, monkeypatch):
    """Through every door that opens the CLIP of a note or of a knowledge base."""
    set_places(copy / "blind", {"clip": "someone/clip"})
    clip = json.loads((copy / "kb" / "manifest.json").read_text())["clip"]
    edit_manifest(copy / "kb", clip=clip | {"source": "someone/clip"})
    asked = []
    original = Clip.load

    def loaded(source, **options):
        asked.append(str(source))
        return original(copy / "clip" if source == "someone/clip" else source, **options)

    monkeypatch.setattr(Clip, "load", loaded)
    for name in ("blind", "valm", "adapter", "whole"):
        model, tokenizer = load(copy / name)
        with pytest.raises(ValmError, match=r"names the CLIP 'someone/clip', which is not a folder"):
            model(torch.tensor([prompt_ids(tokenizer, "a red apple")]))
        with pytest.raises(ValmError, match=r"give its folder or name \(--clip\), or allow its download"):
            load(copy / name, query_dtype=torch.float32)
        assert asked == []
        load(copy / name, clip=str(copy / "clip"))
        load(copy / name, allow_download=True)
        assert asked == [str(copy / "clip"), "someone/clip"]
        asked.clear()


def test_a_clip_alone_where_the_model_needs_a_knowledge_base(copy):
    set_identity(copy / "valm", identity(copy / "blind"))
    set_places(copy / "valm", read_places(copy / "blind"))
    model, tokenizer = load(copy / "valm")
    with pytest.raises(ValmError, match=r"cannot be retrieved: this model needs a knowledge base, not only a CLIP"):
        model(torch.tensor([prompt_ids(tokenizer, "a red apple")]))
    with pytest.raises(ValmError, match=r"^this model needs a knowledge base, not only a CLIP: give it as kb \(--kb\)"):
        load(copy / "valm", clip=str(copy / "clip"))


def test_segments_of_ones_own_are_noted(copy):
    """A model whose CLIP reads a text in other segments does so again after it was opened."""
    model, tokenizer = load(copy / "valm")
    kb = ImageKnowledgeBase.open(copy / "kb")
    model.set_retriever(Retriever(ContextEncoder(kb.load_clip(), tokenizer=tokenizer, overlap=0, min_tokens=2), kb, 1))
    save_checkpoint(model, tokenizer, copy / "segments")
    rule = load(copy / "segments", kb=copy / "more")[0].retriever.encoder.rule
    assert (rule.overlap, rule.min_tokens) == (0, 2)
    assert load(copy / "segments")[0].retriever.encoder.rule == model.retriever.encoder.rule
    without = identity(copy / "valm")
    del without["overlap"], without["min_tokens"]
    set_identity(copy / "valm", without)
    assert load(copy / "valm")[0].retriever.encoder.rule == ContextEncoder(kb.load_clip()).rule


@pytest.mark.parametrize("way", ["save_pretrained", "save_checkpoint", "save_adapter"])
def test_a_model_that_reads_the_text_alone_keeps_what_finds_its_images(copy, way):
    """As one whose retriever was removed, or exchanged for a control's."""
    folder = copy / ("adapter" if way == "save_adapter" else "valm")
    model, tokenizer = load(folder)
    found, places = identity(folder), read_places(folder)
    model.set_retriever(None)
    if way == "save_pretrained":
        model.save_pretrained(folder)
    elif way == "save_checkpoint":
        save_checkpoint(model, tokenizer, folder)
    else:
        save_adapter(model, folder)
    assert (identity(folder), read_places(folder)) == (found, places)
    assert isinstance(load(folder)[0].retriever, Retriever)


def test_a_model_whose_folder_is_gone_is_saved_with_its_images(copy, tmp_path):
    model, tokenizer = load(copy / "valm")
    shutil.rmtree(copy / "valm")
    save_checkpoint(model, tokenizer, tmp_path / "again")
    assert load(tmp_path / "again")[0].retriever.kb.path.samefile(copy / "kb")


@pytest.mark.parametrize("name", ["valm", "adapter"])
def test_a_model_keeps_its_images_when_the_process_goes_elsewhere(copy, tmp_path, monkeypatch, name):
    monkeypatch.chdir(copy)
    (tmp_path / "elsewhere").mkdir()
    model, _ = load(name)
    plain = AutoModelForCausalLM.from_pretrained("valm")
    kb = ImageKnowledgeBase.open("kb")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert kb.item(0).uri == "0.png"
    assert isinstance(model.retriever, Retriever) and isinstance(plain.retriever, Retriever)
    model.save_pretrained("again")
    assert (tmp_path / "elsewhere" / "again" / "_retrieval.json").is_file()


def test_what_is_written_through_a_link_finds_its_clip_and_knowledge_base(copy, tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    link = copy / "link"
    link.symlink_to(tmp_path / "disk" / "deep")
    built = build(FolderSource(copy / "kb-pictures"), link / "kb", Clip.load(copy / "clip"), progress=False)
    assert built.load_clip().weights_hash == Clip.load(copy / "clip").weights_hash
    merged = merge([link / "kb", copy / "more"], link / "merged")
    assert merged.load_clip().weights_hash == built.load_clip().weights_hash
    model, tokenizer = load(copy / "valm")
    save_checkpoint(model, tokenizer, link / "valm")
    assert load(link / "valm")[0].retriever.kb.fingerprint == model.retriever.kb.fingerprint
    adapter, tokenizer = load(copy / "adapter")
    save_adapter(adapter, link / "adapter")
    tokenizer.save_pretrained(link / "adapter")
    assert load(link / "adapter")[0].retriever.kb.fingerprint == model.retriever.kb.fingerprint


def test_a_merge_names_the_clip_that_is_there(copy):
    """The first part has lost its CLIP; none has it."""
    (copy / "far").mkdir()
    shutil.move(copy / "kb", copy / "far" / "kb")
    merged = merge([copy / "far" / "kb", copy / "more"], copy / "merged")
    assert merged.load_clip().name == "clip"
    alone = merge([copy / "far" / "kb"], copy / "alone")
    assert alone.load_clip().name == "clip"  # where it was before, which its weights confirm


def test_a_training_saves_over_a_folder_with_places_of_its_own(copy):
    model, tokenizer = load(copy / "whole")
    save_checkpoint(model, tokenizer, copy / "checkpoint-1")
    model.set_retriever(None)
    with pytest.warns(UserWarning, match=OTHER_KB):
        model.set_retriever(retriever(copy, "more"))
    model.save_pretrained(copy / "checkpoint-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(copy / "checkpoint-1", strict=True)[0].retriever.kb.path.name == "more"


def test_what_a_retriever_of_ones_own_found_is_not_found_elsewhere(copy):
    """A folder cannot describe it, so its model does not open the knowledge base of before in silence."""
    model, tokenizer = load(copy / "whole")
    model.set_retriever(NoImages(1, model.fusion_options.image_dim))  # text alone: the images stay known
    save_checkpoint(model, tokenizer, copy / "saved")
    assert load(copy / "saved", strict=True)[0].retriever.kb.path.name == "kb"
    model.set_retriever(SimpleNamespace(k=1, dim=model.fusion_options.image_dim))
    save_checkpoint(model, tokenizer, copy / "saved")
    assert load(copy / "saved")[0].retriever is None


def test_a_save_of_one_checkpoint_keeps_the_places_of_the_others(copy):
    model, tokenizer = load(copy / "whole")
    model.save_pretrained(copy / "run" / "checkpoint-1")
    tokenizer.save_pretrained(copy / "run" / "checkpoint-1")
    other = augment(AutoModelForCausalLM.from_pretrained(copy / "base"), model.fusion_options.image_dim, 1)
    save_checkpoint(other, tokenizer, copy / "run" / "checkpoint-2")
    assert load(copy / "run" / "checkpoint-1", strict=True)[0].retriever.kb.path.name == "kb"
