"""Every writer, killed before each change that it makes to its folder: nothing is lost, and run again it finishes.

The checkpoint's own test is in tests/valm/test_checkpoint.py. Each test prints its kills (`pytest -rP`).
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.valm.killed import exit_code_if_killed_at, needs_fork
from tests.valm.retrieval.indexed import K, make_indexed, random_directions
from tests.valm.tiny_clip import TEXTS
from valm.clip import Clip
from valm.corpus.retrieved import CorpusRetrieval, retrieve_files
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.dedupe import dedupe
from valm.knowledge_base.encode import Encoding
from valm.knowledge_base.merge import merge
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_index import FaissIndex, open_index, verify_index
from valm.retrieval.index_tuning import build_index
from valm.retrieval.note import RETRIEVAL_FILE, RetrievalNote
from valm.retrieval.retriever import Retriever
from valm_kernels import FlatIPIndex
from valm_kernels.atomic_files import remove_leftovers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_fork]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def kill_everywhere(
    write: Callable[[Path], object],
    check: Callable[[Path, bool], None],
    folder: Path,
    prepare: Callable[[Path], None] = lambda out: None,
) -> int:
    """Kills `write` before each change of its folder, which `prepare` filled; `check` sees what is left, and whether
    all was done."""
    point = 0
    while True:
        out = folder / str(point)
        out.mkdir()
        prepare(out)
        code = exit_code_if_killed_at(lambda out=out: write(out), out, point)
        check(out, code == 0)
        if code == 0:
            print(f"{point} kills")
            return point
        assert code == -signal.SIGKILL
        point += 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.new("RGB", (32, 32), (40 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    (folder / "6.png").write_text("no image")
    return folder


def test_knowledge_base(pictures, clip, tmp_path):
    def write(out: Path) -> ImageKnowledgeBase:
        return build(FolderSource(pictures, shard_size=3), out, clip, Encoding(batch_size=2), progress=False)

    whole = contents(write(tmp_path / "whole").path)

    def check(out: Path, done: bool) -> None:
        if not done:
            try:
                assert ImageKnowledgeBase.open(out).verify(progress=False) == []
            except ValmError as error:
                assert "is unfinished" in str(error) or "has no manifest.json" in str(error)
        write(out)
        assert contents(out) == whole

    assert kill_everywhere(write, check, tmp_path) >= 20


@pytest.mark.parametrize("how", ["merge", "dedupe"])
def test_copies_of_knowledge_bases(make_kb, tmp_path, how):
    kb = make_kb(4)

    def write(out: Path) -> ImageKnowledgeBase:
        return merge([kb.path, kb.path], out, progress=False) if how == "merge" else dedupe(kb, out, progress=False)

    whole = contents(write(tmp_path / "whole").path)

    def check(out: Path, done: bool) -> None:
        write(out)
        assert contents(out) == whole
        assert ImageKnowledgeBase.open(out).verify(progress=False) == []

    assert kill_everywhere(write, check, tmp_path) >= 10


@pytest.mark.parametrize("old", [False, True])
def test_index(clip, tmp_path, old):
    """The knowledge base has the old index, none, or the new one, and is searched in every case."""
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    kb = make_indexed(clip, tmp_path / "kb", factory="IVF16,Flat", target_recall=0.5)
    queries = torch.from_numpy(random_directions(400, kb.dim, seed=1)).float()
    exact = FlatIPIndex(kb.vectors()).search(queries[:5], 1)

    def prepare(out: Path) -> None:
        shutil.copytree(kb.path, out, dirs_exist_ok=True)
        if not old:
            for file in out.glob("index.*"):
                file.unlink()

    def write(out: Path) -> FaissIndex:
        opened = ImageKnowledgeBase.open(out)
        return build_index(opened, queries, "IVF8,Flat", k=K, target_recall=0.5, progress=False)

    def check(out: Path, done: bool) -> None:
        opened = ImageKnowledgeBase.open(out)
        assert opened.verify(progress=False) == [] and verify_index(opened) == []
        index = open_index(opened)
        found = index.search(queries[:5], 1)
        if isinstance(index, FaissIndex):
            factory = index.parameters.factory
            assert factory in (("IVF8,Flat",) if done or not old else ("IVF8,Flat", "IVF16,Flat"))
        else:
            assert not done and torch.equal(found.indices, exact.indices)
        write(out)
        assert not list(out.glob("*.tmp"))

    assert kill_everywhere(write, check, tmp_path, prepare) >= 3


@pytest.mark.parametrize("old", [False, True])
def test_note_on_retrieval(tmp_path, old):
    def prepare(out: Path) -> None:
        if old:
            RetrievalNote(tmp_path / "old", "eot").write(out)

    def write(out: Path) -> None:
        RetrievalNote(tmp_path / "new", "state").write(out)

    def check(out: Path, done: bool) -> None:
        note = RetrievalNote.read(out)
        if note is None:
            assert not old and not done
        else:
            assert note.knowledge_base is not None
            assert note.knowledge_base.name in (("new",) if done or not old else ("old", "new"))
        write(out)
        remove_leftovers(out)
        assert [file.name for file in out.iterdir()] == [RETRIEVAL_FILE]

    assert kill_everywhere(write, check, tmp_path, prepare) >= 2


def test_corpus_retrieval(clip, make_kb, tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(TEXTS))
    retriever = Retriever(ContextEncoder(clip), make_kb(6), 2)

    def write(out: Path) -> CorpusRetrieval:
        return retrieve_files([text], retriever, out, part_bytes=60, progress=False)

    whole = contents(write(tmp_path / "whole").path)

    def check(out: Path, done: bool) -> None:
        if not done:
            try:
                assert CorpusRetrieval.open(out).verify(progress=False) == []
            except ValmError as error:
                assert "is unfinished" in str(error) or "has no manifest.json" in str(error)
        write(out)
        assert contents(out) == whole

    assert kill_everywhere(write, check, tmp_path) >= 20


@pytest.mark.parametrize("old", [False, True])
def test_flat_index(tmp_path, old):
    rows = [torch.from_numpy(np.random.default_rng(seed).normal(size=(40, 16)).astype(np.float32)) for seed in (0, 1)]
    indexes = [FlatIPIndex(one, "int8") for one in rows]

    def write(out: Path) -> None:
        indexes[1].save(out)

    def prepare(out: Path) -> None:
        if old:
            indexes[0].save(out)

    def check(out: Path, done: bool) -> None:
        try:
            found = FlatIPIndex.load(out, verify=True)
        except FileNotFoundError:
            assert not old and not done
        else:
            possible = indexes[1:] if done or not old else indexes
            assert any(torch.equal(found.dequantised(), one.dequantised()) for one in possible)
        write(out)
        assert torch.equal(FlatIPIndex.load(out).dequantised(), indexes[1].dequantised())
        assert not list(out.glob("*.tmp"))

    assert kill_everywhere(write, check, tmp_path, prepare) >= 5


def test_clip(clip, tmp_path):
    whole = tmp_path / "whole"
    clip.save(whole)

    def check(out: Path, done: bool) -> None:
        try:
            assert Clip.load(out).weights_hash == clip.weights_hash
        except ValmError:
            assert not done
        remove_leftovers(out)
        clip.save(out)
        assert contents(out) == contents(whole)

    assert kill_everywhere(clip.save, check, tmp_path) >= 3
