"""Nothing that is uploaded of a model says where it, its base or its images are on the user's disk."""

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM

from tests.valm.model.decoders import tiny_llama
from tests.valm.models import model_for
from tests.valm.three_images import retriever_in
from tests.valm.uploads import SECRET, Uploads
from valm.model.adapter import save_adapter
from valm.model.augment import augment
from valm.model.card import MARKER
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.source import RetrievalSource


@pytest.fixture
def uploads(monkeypatch):
    return Uploads(monkeypatch)


@pytest.fixture(params=["valm", "augmented"])
def model(request, clip, tmp_path):
    """One that was opened from a folder, as was its base, with a knowledge base in a folder."""
    root = tmp_path / SECRET
    root.mkdir()
    retriever = retriever_in(root, clip)
    tokenizer = retriever.encoder.tokenizer
    if request.param == "valm":
        model = model_for(retriever)
        model.set_retriever(retriever)
        save_checkpoint(model, tokenizer, root / "model")
        return load(root / "model")[0]
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model = augment(AutoModelForCausalLM.from_pretrained(root / "base"), retriever.dim, retriever.k)
    model.set_retriever(retriever)
    return model


def test_push_to_hub(model, uploads, tmp_path):
    model.push_to_hub("me/it")
    uploads.check("me/it", model.finder.source, str(tmp_path))


def test_save_pretrained_uploads_a_copy(model, uploads, tmp_path):
    folder = tmp_path / SECRET / "mine"
    folder.mkdir()
    (folder / "README.md").write_text(f"Mine, in {folder}.")
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/it", private=True)
    uploads.check("me/it", model.finder.source, str(tmp_path))
    assert (folder / "README.md").read_text() == f"Mine, in {folder}."
    assert RetrievalSource.of_config(model.config.retrieval, folder).knowledge_base.samefile(tmp_path / SECRET / "kb")
    assert uploads.options[0]["private"]
    model.save_pretrained(tmp_path / "named", True, None, True)  # by its folder, as transformers has it
    uploads.check("me/named", model.finder.source, str(tmp_path))


@pytest.mark.parametrize("model", ["augmented"], indirect=True)
def test_an_adapter_as_the_guide_publishes_it(model, uploads, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    assert (folder / "_retrieval.json").is_file()
    huggingface_hub.upload_folder(folder_path=folder, repo_id="me/it", ignore_patterns=["_*", "checkpoint-*"])
    uploads.check("me/it", model.finder.source, str(tmp_path))


@pytest.mark.parametrize("model", ["valm"], indirect=True)
def test_the_card_of_a_repository_stays_where_it_is_the_users_own(model, uploads):
    uploads.card = "---\nlicense: mit\n---\nMine."
    model.push_to_hub("me/it")
    assert b"Mine." in uploads["me/it/README.md"] and MARKER.encode() not in uploads["me/it/README.md"]
    uploads.card = f"{MARKER}\nThat of an earlier model."
    model.push_to_hub("me/it")
    assert b"earlier" not in uploads["me/it/README.md"] and MARKER.encode() in uploads["me/it/README.md"]
