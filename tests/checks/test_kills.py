"""Every writer, killed before each change that it makes to its folder: nothing is lost, and run again it finishes.

The checkpoint's own test is in tests/valm/model/test_checkpoint.py. The end of the run says how often each was done.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoModelForCausalLM

from tests.checks.counts import COUNTS
from tests.valm.cli.commands import run
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.killed import exit_code, exit_code_if_killed_at, forked, killed_at, needs_fork
from tests.valm.model.decoders import IMAGE_DIM, IMAGES, tiny_llama
from tests.valm.models import tiny_model
from tests.valm.retrieval.indexed import K, make_indexed, make_kb_of_directions, random_directions
from tests.valm.store.manifests import contents
from tests.valm.tiny_clip import TEXTS, make_clip
from tests.valm.training.documents import TOKENIZER, new_trainer
from valm.clip.clip import Clip
from valm.corpus.retrieved import CorpusRetrieval, retrieve_corpus
from valm.corpus.texts import read_documents
from valm.errors import ValmError
from valm.evaluation.report import write_report
from valm.evaluation.settings import Settings
from valm.evaluation.suite import CACHE, evaluate
from valm.knowledge_base.build import build
from valm.knowledge_base.copy import dedupe, merge
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.adapter import load_adapter, save_adapter
from valm.model.augment import augment, fusion_module
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_index import FaissIndex, open_index, verify_index
from valm.retrieval.index_tuning import build_index
from valm.retrieval.retriever import Retriever
from valm.training.image_trainer import newest_checkpoint
from valm_kernels import FlatIPIndex
from valm_kernels.atomic_files import is_temporary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_fork]


# Ended by SIGTERM a process runs no code of its own any more either; interrupted, it does.
ENDED = {signal.SIGKILL: [-signal.SIGKILL], signal.SIGTERM: [-signal.SIGTERM], signal.SIGINT: [1, 130]}


def kill_everywhere(
    write: Callable[[Path], object],
    check: Callable[[Path, bool], None],
    folder: Path,
    prepare: Callable[[Path], None] = lambda out: None,
) -> int:
    """Ends `write` before each change of its folder, which `prepare` filled: by SIGKILL, and at every third also by
    SIGTERM and by SIGINT. `check` sees what is left, and whether all was done. Returns the number of changes."""
    point = 0
    while True:
        for number, codes in ENDED.items():
            if number != signal.SIGKILL and point % 3:
                continue
            out = folder / number.name / str(point)
            out.mkdir(parents=True)
            prepare(out)
            code = exit_code_if_killed_at(lambda out=out: write(out), out, point, number)
            check(out, code == 0)
            assert code in (0, *codes)
            COUNTS[f"times {number.name}"] += code != 0
            if number == signal.SIGKILL and code == 0:
                return point
        point += 1


def write_together(folder: Path, *writes: Callable[[Path], object]) -> list[str]:
    """All of `writes` into `folder` at once, each in a process of its own. Returns what each ended with: "", or its
    sentence."""
    start = multiprocessing.get_context("fork").Barrier(len(writes))
    ends = [folder.with_name(f"{folder.name}-{place}.txt") for place in range(len(writes))]

    def run(write: Callable[[Path], object], end: Path) -> None:
        start.wait()
        try:
            write(folder)
            end.write_text("")
        except (ValmError, OSError) as error:
            end.write_text(str(error))

    children = [forked(lambda write=write, end=end: run(write, end)) for write, end in zip(writes, ends, strict=True)]
    assert [exit_code(child) for child in children] == [0] * len(children)
    COUNTS["pairs of writers at once"] += 1
    return [end.read_text() for end in ends]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.new("RGB", (32, 32), (40 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    (folder / "6.png").write_text("no image")
    return folder


@pytest.fixture
def builds(pictures, clip, tokenizer, make_kb, tmp_path) -> dict[str, Callable[[Path], object]]:
    """Writers of knowledge bases and of corpora."""
    make_clip(tokenizer).save(tmp_path / "clip")
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(TEXTS))
    kb = make_kb(6)

    def add(out: Path) -> None:
        if status := run("kb", "add", kb.path, pictures, "--clip", tmp_path / "clip", "--out", out):
            sys.exit(status)

    def retrieve(out: Path, k: int = 2) -> CorpusRetrieval:
        retriever = Retriever(ContextEncoder(clip), kb, k)
        return retrieve_corpus(read_documents([text]), retriever, out, part_bytes=60, progress=False)

    return {
        "kb": lambda out: build(
            FolderSource(pictures, shard_size=3), out, clip, Encoding(batch_size=2), progress=False
        ),
        "merge": lambda out: merge([kb.path, kb.path], out),
        "dedupe": lambda out: dedupe(kb, out, progress=False),
        "add": add,
        "corpus": retrieve,
        "corpus of three": lambda out: retrieve(out, k=3),
    }


@pytest.mark.parametrize(("name", "changes"), [("kb", 20), ("merge", 10), ("dedupe", 10), ("add", 40), ("corpus", 20)])
def test_builds(builds, tmp_path, name, changes):
    write = builds[name]
    store = CorpusRetrieval if name == "corpus" else ImageKnowledgeBase
    beside = tmp_path / signal.SIGKILL.name / "whole"  # where the CLIP is noted relative to it, as in all others
    beside.parent.mkdir()
    write(beside)
    whole = contents(beside)
    assert store.open(beside).verify(progress=False) == []

    def check(out: Path, done: bool) -> None:
        if not done:
            try:
                assert store.open(out).verify(progress=False) == []
            except ValmError as error:
                assert "is unfinished" in str(error) or "has no manifest.json" in str(error)
        write(out)
        assert contents(out) == whole

    assert kill_everywhere(write, check, tmp_path) >= changes


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
        assert not list(out.glob("*.tmp")) and not list(out.glob("*.partial"))
        assert (out / "index.faiss").read_bytes() == whole, "what was left of a build changed the next one"

    prepare(tmp_path / "whole")
    write(tmp_path / "whole")
    whole = (tmp_path / "whole" / "index.faiss").read_bytes()
    assert kill_everywhere(write, check, tmp_path, prepare) >= 3


class Saved(NamedTuple):
    """Two values of one kind, how one is saved, whether a folder has it, and what is said of a folder without any."""

    values: list[Any]
    save: Callable[[Any, Path], object]
    has: Callable[[Path, Any], bool]
    missing: str


def flat_indexes(tokenizer: Any, folder: Path) -> Saved:
    rows = [torch.from_numpy(np.random.default_rng(seed).normal(size=(40, 16)).astype(np.float32)) for seed in (0, 1)]

    def has(out: Path, index: FlatIPIndex) -> bool:
        return torch.equal(FlatIPIndex.load(out, verify=True).dequantised(), index.dequantised())

    return Saved([FlatIPIndex(one, "int8") for one in rows], FlatIPIndex.save, has, "is not a saved index")


def clips(tokenizer: Any, folder: Path) -> Saved:
    def has(out: Path, clip: Clip) -> bool:
        return Clip.load(out).weights_hash == clip.weights_hash

    return Saved([make_clip(tokenizer, seed) for seed in (1, 0)], Clip.save, has, "")


def adapters(tokenizer: Any, folder: Path) -> Saved:
    tiny_llama().save_pretrained(folder / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base")

    def adapter(value: float) -> Any:
        made = augment(base(), IMAGE_DIM, IMAGES)
        torch.nn.init.constant_(fusion_module(made).k_bias, value)
        return made

    def has(out: Path, model: Any) -> bool:
        return torch.equal(fusion_module(load_adapter(base(), out)).k_bias, fusion_module(model).k_bias)

    return Saved([adapter(1.0), adapter(2.0)], save_adapter, has, "is no adapter")


def checkpoints(tokenizer: Any, folder: Path) -> Saved:
    def save(model: Any, out: Path) -> None:
        save_checkpoint(model, TOKENIZER, out)

    def has(out: Path, model: Any) -> bool:
        return all(map(torch.equal, load(out)[0].parameters(), model.parameters()))

    return Saved([tiny_model(seed, vocab_size=len(TOKENIZER)) for seed in (0, 1)], save, has, "")


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".tmp", ".new")]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("kind", "changes"), [(flat_indexes, 5), (clips, 3), (adapters, 10)])
def test_saves(tokenizer, tmp_path, kind, changes, old):
    """The folder has the old one, if there was one, or the new one."""
    saved, whole = kind(tokenizer, tmp_path), tmp_path / "whole"
    before, after = saved.values
    saved.save(after, whole)

    def prepare(out: Path) -> None:
        if old:
            saved.save(before, out)

    def write(out: Path) -> None:
        saved.save(after, out)

    def check(out: Path, done: bool) -> None:
        try:
            assert saved.has(out, after) or (old and not done and saved.has(out, before))
        except (ValmError, OSError) as error:
            assert saved.missing in str(error) and not old and not done
        write(out)
        assert saved.has(out, after) and not leftovers(out)
        assert kind is not clips or contents(out) == contents(whole)

    assert kill_everywhere(write, check, tmp_path, prepare) >= changes


def test_checkpoints_of_a_training(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    uninterrupted = new_trainer(tmp_path / "whole", **fields)
    uninterrupted.train()

    def write(out: Path) -> None:
        new_trainer(out, **fields).train()

    def check(out: Path, done: bool) -> None:
        resumed = new_trainer(out, **fields)
        resumed.train(resume_from_checkpoint=newest_checkpoint(out))
        assert resumed.losses() == uninterrupted.losses()
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "checkpoint-2"]

    assert kill_everywhere(write, check, tmp_path) >= 30


def as_one_of_two(train: Callable[[], object], rank: int, port: int) -> Callable[[], None]:
    """For a child: `train` as one of two processes of a launched training."""

    def run() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        train()

    return run


def train_as_two(train: Callable[[], object], folder: Path, killed: int | None = None, point: int = 0) -> list[int]:
    """Exit codes of two processes that `train`, of which `killed` ends before its `point`-th change of `folder`."""
    port = get_free_port()
    works = [train if rank != killed else killed_at(train, folder, point) for rank in range(2)]
    children = [forked(as_one_of_two(work, rank, port)) for rank, work in enumerate(works)]
    return [exit_code(child) for child in children]


@pytest.mark.parametrize("killed", [0, 1])
def test_checkpoints_of_a_training_of_two_processes(tmp_path, killed):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "per_device_train_batch_size": 2}

    def train(out: Path, losses: Path) -> None:
        training = new_trainer(out, **fields)
        training.train(resume_from_checkpoint=newest_checkpoint(out) if out.is_dir() else None)
        losses.write_text(json.dumps(training.losses()))

    assert train_as_two(lambda: train(tmp_path / "whole", tmp_path / "losses"), tmp_path) == [0, 0]
    point = 0
    while True:
        out, losses = tmp_path / str(point), tmp_path / f"{point}.json"
        codes = train_as_two(lambda out=out, losses=losses: train(out, losses), out, killed, point)
        if codes == [0, 0]:
            break
        assert codes[killed] == -signal.SIGKILL and (codes[1 - killed] != 0 or newest_checkpoint(out).endswith("-2"))
        COUNTS["times one of two"] += 1
        assert train_as_two(lambda out=out, losses=losses: train(out, losses), out) == [0, 0]
        assert losses.read_text() == (tmp_path / "losses").read_text()
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "checkpoint-2"]
        point += 1
    assert point >= (30 if killed == 0 else 3)


def test_evaluation(tmp_path):
    write_sets(tmp_path / "data")
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = tiny_model(0, vocab_size=len(TOKENIZER), num_images=0, n_positions=96, **ids)
    save_checkpoint(model, TOKENIZER, tmp_path / "model")
    asked = Settings(tasks=["relative_size", "lambada"], data=tmp_path / "data")
    models = {"model": [str(tmp_path / "model")]}

    def write(out: Path) -> None:
        write_report(evaluate(models, asked, out, progress=False), out)

    write(tmp_path / "whole")
    whole = contents(tmp_path / "whole") | contents(tmp_path / "whole" / CACHE)

    def check(out: Path, done: bool) -> None:
        for file in out.rglob("*"):
            assert file.is_dir() or is_temporary(file.name) or file.read_bytes() == whole[file.name]
        write(out)
        assert {file.name for file in out.rglob("*") if file.is_file() and not is_temporary(file.name)} == set(whole)

    assert kill_everywhere(write, check, tmp_path) >= 10


def test_two_builds_at_once(builds, tmp_path):
    """One is made, and the other writer finds it finished or is refused in a sentence."""
    for name, another in (("kb", "merge"), ("corpus", "corpus of three")):
        write, other = builds[name], builds[another]
        wholes = []
        for each in (name, another):
            builds[each](tmp_path / each)
            wholes.append(contents(tmp_path / each))
        for number in range(5):
            ends = write_together(tmp_path / f"{name}-same-{number}", write, write)
            assert all("another process is writing" in end for end in ends if end) and "" in ends
            assert contents(tmp_path / f"{name}-same-{number}") == wholes[0]
            ends = write_together(tmp_path / f"{name}-other-{number}", write, other)
            assert contents(tmp_path / f"{name}-other-{number}") in wholes and sorted(map(bool, ends)) == [False, True]


@pytest.mark.parametrize("kind", [flat_indexes, checkpoints, clips])
def test_two_saves_at_once(tokenizer, tmp_path, kind):
    """One of the two is there, whole."""
    saved = kind(tokenizer, tmp_path)
    writes = [lambda out, value=value: saved.save(value, out) for value in saved.values]
    for number in range(5):
        out = tmp_path / str(number)
        assert write_together(out, *writes) == ["", ""]
        assert any(saved.has(out, value) for value in saved.values)
        assert not leftovers(out)


def test_two_indexes_at_once(clip, tmp_path):
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    kb = make_kb_of_directions(clip, tmp_path / "kb")
    queries = torch.from_numpy(random_directions(400, kb.dim, seed=1)).float()

    def index(out: Path, factory: str) -> None:
        build_index(ImageKnowledgeBase.open(out), queries, factory, k=K, target_recall=0.5, progress=False)

    for _ in range(3):
        ends = write_together(kb.path, lambda out: index(out, "IVF8,Flat"), lambda out: index(out, "IVF16,Flat"))
        assert ends == ["", ""]
        assert verify_index(kb) == [] and isinstance(open_index(kb), FaissIndex)
