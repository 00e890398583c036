"""Whatever opens a path says in one sentence that it may not, or that the name is no name."""

import os
from pathlib import Path

import pytest

from valm.clip.clip import Clip
from valm.clip.tokenizer import load_tokenizer, open_tokenizer
from valm.corpus.retrieved import CorpusRetrieval
from valm.corpus.texts import read_documents
from valm.errors import ValmError
from valm.evaluation.scorers import open_scorer
from valm.evaluation.settings import Settings
from valm.knowledge_base.sources.folder import FolderSource, TableSource
from valm.knowledge_base.sources.zip_file import ZipSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.adapter import load_adapter
from valm.model.checkpoint import load, load_decoder
from valm.retrieval.source import read_places
from valm.store.files import read_text, writable_folder
from valm.training.image_trainer import check_resumable

DOORS = {
    "model": load,
    "adapter": lambda path: load_adapter(None, path),
    "decoder": load_decoder,
    "tokenizer": load_tokenizer,
    "saved tokenizer": open_tokenizer,
    "evaluation": lambda folder: open_scorer(folder, Settings()),
    "CLIP": Clip.load,
    "knowledge base": ImageKnowledgeBase.open,
    "corpus": lambda path: read_documents([path]),
    "corpus retrieval": CorpusRetrieval.open,
    "places": read_places,
    "checkpoint": lambda path: check_resumable(Path(path)),
    "images": lambda path: FolderSource(Path(path)),
    "zip": ZipSource,
    "table": lambda path: TableSource(Path(path)).plan(),
    "text": read_text,
    "output": writable_folder,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000], ids=["long", "deep"])
def test_a_name_that_no_file_has_is_one_sentence(tmp_path, monkeypatch, door, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValmError, OSError)) as raised:
        DOORS[door](name)
    assert "\n" not in str(raised.value)


@pytest.fixture
def locked(tmp_path):
    """A folder in one that this user may not enter; root becomes nobody, whom the tests' folders are closed to."""
    folder = tmp_path / "locked" / "folder"
    folder.mkdir(parents=True)
    folder.parent.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.parent.chmod(0o700)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
@pytest.mark.parametrize("door", DOORS)
def test_what_may_not_be_looked_at_is_not_called_missing(locked, door):
    with pytest.raises((ValmError, PermissionError), match=r"(?i)permission denied"):
        DOORS[door](str(locked))
