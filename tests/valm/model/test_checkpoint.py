import errno
import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.valm.hub_cache import as_in_the_hub_cache
from tests.valm.killed import exit_code, exit_code_if_killed_at, forked, needs_fork
from tests.valm.models import model_for, tiny_model
from tests.valm.three_images import retriever_in
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.retriever import BlindRetriever
from valm.store import folders
from valm_kernels.atomic_files import is_temporary

TOKENIZER = prune_tokenizer(clip_tokenizer(), ["the sea is blue"])


def a_model(seed=0, **arguments):
    return tiny_model(seed, vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id, **arguments)


def fail(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_saved_checkpoint_opens_here_and_in_transformers(tmp_path):
    model = a_model()
    folder = save_checkpoint(model, TOKENIZER, tmp_path / "new" / "folder")
    loaded, tokenizer = load(folder)
    assert not loaded.training
    assert tokenizer.model_max_length == 32 < TOKENIZER.model_max_length
    ids = tokenizer("the sea is blue", return_tensors="pt")["input_ids"]
    for opened in (loaded, AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(opened(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("sea")["input_ids"] == TOKENIZER("sea")["input_ids"]


def test_a_snapshot_in_the_hub_cache_is_loaded(tmp_path):
    save_checkpoint(a_model(0), TOKENIZER, tmp_path / "model")
    assert weights_of(as_in_the_hub_cache(tmp_path / "model", tmp_path / "cache")) == 0


def test_saving_again_replaces_and_leaves_nothing_else_of_a_model(tmp_path):
    """transformers would read one file of weights before several, whichever is newer."""
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    save_checkpoint(a_model(1), TOKENIZER, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == names | {"notes.txt"}
    assert weights_of(tmp_path) == 1


def weights_of(folder):
    """Seed of the model in `folder`, by its weights."""
    found = load(folder)[0].transformer.wte.weight
    (seed,) = (seed for seed in (0, 1) if torch.equal(found, a_model(seed).transformer.wte.weight))
    return seed


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(TOKENIZER), "save_pretrained", fail)
        with pytest.raises(OSError, match=rf"No space left.*{tmp_path}"):
            save_checkpoint(a_model(1), TOKENIZER, tmp_path)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(folders, "move", fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(a_model(1), TOKENIZER, tmp_path)
    assert weights_of(tmp_path) == 1
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    assert contents(tmp_path) == before


@needs_fork
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files stands for it."""
    resource = pytest.importorskip("resource")
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    before = contents(tmp_path)

    def save(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() reports EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_checkpoint(a_model(1), TOKENIZER, tmp_path)
        except (ValmError, OSError) as error:
            os._exit(3 if str(tmp_path) in str(error) else 4)

    for limit in (100, 1000, 30_000):
        assert exit_code(forked(lambda limit=limit: save(limit))) == 3
        assert contents(tmp_path) == before


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("old", [None, 0])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(tmp_path, old):
    save_checkpoint(a_model(1), TOKENIZER, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    seen = []
    for point in range(100):
        folder = tmp_path / str(point)
        folder.mkdir()
        if old is not None:
            save_checkpoint(a_model(old), TOKENIZER, folder)

        def save(folder=folder):
            save_checkpoint(a_model(1), TOKENIZER, folder)

        code = exit_code_if_killed_at(save, folder, point)
        try:
            seen.append(weights_of(folder))
        except ValmError as error:
            assert "is no checkpoint" in str(error) and old is None
            assert all(is_temporary(file.name) for file in folder.iterdir())
            seen.append(None)
        save()
        assert contents(folder) == whole
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and seen == sorted(seen, key=lambda seed: seed == 1) and set(seen) == {old, 1}
    print(f"{len(seen) - 1} kills")


@pytest.mark.parametrize("sizes", [(None, "20KB"), ("20KB", None)])
def test_a_model_saved_by_transformers_over_another_number_of_files(tmp_path, sizes):
    TOKENIZER.save_pretrained(tmp_path)
    for seed, size in enumerate(sizes):
        a_model(seed).save_pretrained(tmp_path, **({} if size is None else {"max_shard_size": size}))
    assert weights_of(tmp_path) == 1
    assert (tmp_path / "model.safetensors").is_file() != (tmp_path / "model.safetensors.index.json").is_file()
    assert (tmp_path / "model.safetensors").is_file() == (sizes[1] is None)


def test_a_model_saved_by_transformers_takes_the_place_of_a_killed_save(tmp_path):
    """`save_pretrained` first moves what the killed process left, so that this is not loaded in its place."""
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    save_checkpoint(a_model(0), TOKENIZER, tmp_path / folders.NEW_FOLDER)
    a_model(1).save_pretrained(tmp_path)
    assert weights_of(tmp_path) == 1
    assert not (tmp_path / folders.NEW_FOLDER).exists()


def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValmError, match="there is no checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValmError, match="is no checkpoint"):
        load(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    message = "contains a model of type 'gpt2', expected 'valm': add images to it with `valm train --base"
    with pytest.raises(ValmError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("base_config", {"n_layer": 4}, "contain no transformer.h.2.attn.image_fusion"),
        ("base_config", {"n_layer": 2}, "contain no transformer.h.0.attn.image_fusion"),
        ("fusion", {"image_dim": 25}, "mismatched_keys"),
        ("fusion", {"num_images": 0}, "unexpected_keys transformer.h.1.attn.image"),
        ("fusion", {"layer": 5}, "cannot be read: index 5 is out of range"),
    ],
)
def test_weights_of_another_config_are_refused(tmp_path, part, change, message, capfd):
    save_checkpoint(a_model(), TOKENIZER, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {part: config[part] | change}))
    with pytest.raises(ValmError, match=message):
        load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_damaged_weights_and_a_foreign_tokenizer_are_refused(tmp_path):
    save_checkpoint(a_model(), TOKENIZER, tmp_path)
    prune_tokenizer(TOKENIZER, []).save_pretrained(tmp_path)
    with pytest.raises(ValmError, match="has 514 tokens, but the model's vocab_size is"):
        load(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValmError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("blind", [False, True])
def test_a_checkpoint_finds_its_pictures_again(clip, tmp_path, blind):
    place = tmp_path / "place"
    place.mkdir()
    seeing = retriever_in(place, clip)
    retriever = BlindRetriever(seeing.encoder) if blind else seeing
    model, tokenizer = model_for(retriever, blind=blind), seeing.encoder.tokenizer
    model.set_retriever(retriever)
    save_checkpoint(model, tokenizer, place / "model")
    noted = json.loads((place / "model" / "_retrieval.json").read_text())
    assert noted == ({"clip": "../clip"} if blind else {"knowledge_base": "../kb"})
    ids = tokenizer("a red apple", return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    moved = place.rename(tmp_path / "moved")  # all of it together
    loaded, _ = load(moved / "model")
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert load(moved / "model", clip=moved / "clip")[0].retriever.encoder.query == "state"


@pytest.mark.parametrize("old", [False, True])
def test_a_killed_save_finds_its_images(retriever, seeing, apple, tmp_path, monkeypatch, old):
    """What is whole in checkpoint.new: the places there are as seen from the folder itself."""
    tokenizer = retriever.encoder.tokenizer
    if old:
        save_checkpoint(model_for(retriever), tokenizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "move", fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(seeing, tokenizer, tmp_path)
    assert (tmp_path / folders.NEW_FOLDER / "_retrieval.json").is_file()
    assert not (tmp_path / "_retrieval.json").exists()
    torch.testing.assert_close(load(tmp_path)[0](apple).logits, seeing(apple).logits)


def test_a_download_may_be_allowed_of_a_model_that_names_no_clip(tmp_path):
    save_checkpoint(a_model(), TOKENIZER, tmp_path)
    model, _ = load(tmp_path, allow_download=True)
    assert model.retriever is None


def test_pictures_that_do_not_fit_are_refused(tmp_path, clip, make_kb):
    kb = make_kb(3)
    save_checkpoint(tiny_model(num_images=0, vocab_size=len(TOKENIZER)), TOKENIZER, tmp_path / "gpt2")
    with pytest.raises(ValmError, match="sees no images"):
        load(tmp_path / "gpt2", kb=kb.path)
    clip.save(tmp_path / "clip")
    # another vocabulary than the CLIP's is no hindrance
    save_checkpoint(a_model(image_dim=kb.dim), TOKENIZER, tmp_path / "other")
    loaded, _ = load(tmp_path / "other", kb=kb.path, clip=tmp_path / "clip")
    assert loaded.retriever.encoder.alignment is not None
    same = tiny_model(vocab_size=len(clip.tokenizer), image_dim=kb.dim + 1)
    save_checkpoint(same, clip.tokenizer, tmp_path / "wide")
    with pytest.raises(ValmError, match=r"do not fit: retriever\.dim is"):
        load(tmp_path / "wide", kb=kb.path, clip=tmp_path / "clip")
