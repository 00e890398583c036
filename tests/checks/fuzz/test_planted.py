"""Every file of every store in turn as a folder, a link to nothing, empty, zeros, or JSON that is nested deeply:
refused in one sentence, or read as before where the file is not needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checks.counts import COUNTS
from tests.checks.fuzz.mutations import REFUSED, files_of, result_of
from tests.valm.stores import build_kb
from valm import ImageKnowledgeBase, load
from valm.clip.clip import Clip
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError, sentence
from valm.retrieval.faiss_index import open_index
from valm_kernels import FlatIPIndex

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the model's")]

DEPTH = 10_000
PLANTED: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "dead link": lambda file: file.symlink_to(file.name),
    "empty": Path.touch,
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "lists": lambda file: file.write_text("[" * DEPTH + "]" * DEPTH),
    "objects": lambda file: file.write_text('{"a":' * DEPTH + "1" + "}" * DEPTH),
}


def read_knowledge_base(stores: Path) -> None:
    kb = ImageKnowledgeBase.open(stores / "kb")
    kb.verify(progress=False)
    for id in range(len(kb)):
        kb.item(id), kb.thumbnail(id)
    list(kb.skipped()), kb.vectors(), kb.load_clip()
    open_index(kb).search(torch.ones(1, kb.dim), 2)


def read_corpus(stores: Path) -> None:
    corpus = CorpusRetrieval.open(stores / "corpus")
    corpus.verify(progress=False)
    list(corpus), corpus.lengths(), corpus.tokenizer
    corpus.verify_once()


def search_flat_index(stores: Path) -> None:
    queries = np.load(stores / "flat" / "queries.npy", allow_pickle=False)
    FlatIPIndex.load(stores / "flat" / "int8").search(queries, 3)


def load_model(name: str) -> Callable[[Path], Any]:
    def read(stores: Path) -> None:
        model, tokenizer = load(stores / name)
        tokenizer("a red"), model.retriever

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "kb": read_knowledge_base,
    "kb-unfinished": lambda stores: build_kb(stores, stores / "kb-unfinished"),
    "corpus": read_corpus,
    "flat/int8": search_flat_index,
    "clip": lambda stores: Clip.load(stores / "clip"),
    "gpt2": load_model("gpt2"),
    "valm": load_model("valm"),
    "blind": load_model("blind"),
}
# Of these files some ways are read as if they were absent, or the file is made again: nothing needs them.
OPTIONAL = ("generation_config.json", "_retrieval.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", READERS)
def test_planted(whole_stores, tmp_path, name):
    errors = (ValueError, OSError) if name == "flat/int8" else (ValmError, OSError)
    for file in files_of(whole_stores / name):
        for how, plant in PLANTED.items():
            if how in ("lists", "objects") and file.suffix != ".json":
                continue
            stores = Path(shutil.copytree(whole_stores, tmp_path / "stores"))
            (stores / name / file.name).unlink()
            plant(stores / name / file.name)

            def read(stores=stores) -> None:
                try:
                    READERS[name](stores)
                except errors as error:
                    assert "\n" not in sentence(error)
                    raise

            found = result_of(read, errors)
            COUNTS["planted files"] += 1
            if found is not REFUSED:
                print(f"{name}/{file.name} as {how} is not refused")
                assert name == "kb-unfinished" or file.name in OPTIONAL
            shutil.rmtree(stores)
