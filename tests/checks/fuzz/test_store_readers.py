"""Whatever is in the files of a store, reading it is refused in a sentence or has the same result.

`make fuzz MINUTES=10` goes on with other seeds. What fails once is replayed with its seed: VALM_FUZZ_SEED=N pytest ...
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.checks.fuzz.mutations import REFUSED, check_mutants, files_of, fuzzed
from valm import ImageKnowledgeBase
from valm.corpus.retrieved import CorpusRetrieval
from valm.retrieval.index_parameters import index_parameters
from valm.store.shards import ShardedBuild
from valm_kernels import FlatIPIndex

pytestmark = pytest.mark.slow


@fuzzed(300)
def test_knowledge_base(stores, outside, data):
    def read(verified: bool) -> Any:
        kb = ImageKnowledgeBase.open(stores / "kb")
        if verified and kb.verify(progress=False):
            return REFUSED
        items = [kb.item(id) for id in range(len(kb))]
        thumbnails = [small and small.tobytes() for small in map(kb.thumbnail, range(len(kb)))]
        return kb.manifest, items, thumbnails, list(kb.skipped()), kb.vectors().tobytes()

    files = [file for file in files_of(stores / "kb") if not file.name.startswith("index")]
    verified = data.draw(st.booleans())
    check_mutants(data, files, outside, lambda: read(verified), read(True) if verified else ...)


@fuzzed(300)
def test_index_parameters(stores, outside, data):
    kb = ImageKnowledgeBase.open(stores / "kb")

    # without the file there is no index
    def read() -> Any:
        return index_parameters(kb) or REFUSED

    check_mutants(data, [stores / "kb" / "index.json"], outside, read, read())


@fuzzed(300)
def test_corpus_retrieval(stores, outside, data):
    def read(verified: bool) -> Any:
        corpus = CorpusRetrieval.open(stores / "corpus")
        if verified and corpus.verify(progress=False):
            return REFUSED
        corpus.lengths()
        documents = [(document["input_ids"].tolist(), document["image_ids"].tolist()) for document in corpus]
        return corpus.manifest, documents

    verified = data.draw(st.booleans())
    check_mutants(data, files_of(stores / "corpus"), outside, lambda: read(verified), read(True) if verified else ...)


@fuzzed(100)
def test_tokenizer_of_a_corpus(stores, outside, data):
    files = [stores / "corpus" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    vocabulary = CorpusRetrieval.open(stores / "corpus").tokenizer.get_vocab()
    check_mutants(data, files, outside, lambda: CorpusRetrieval.open(stores / "corpus").tokenizer, ...)
    assert CorpusRetrieval.open(stores / "corpus").tokenizer.get_vocab() == vocabulary


@fuzzed(300)
def test_unfinished_builds(stores, outside, data):
    folder = stores / data.draw(st.sampled_from(["kb-unfinished", "corpus-unfinished"]))
    what = "knowledge base" if folder.name.startswith("kb") else "corpus retrieval"
    files = [file for file in files_of(folder) if file.suffix == ".json" or file.name.endswith("00000.npy")]
    plan = json.loads((folder / "build.json").read_text())["plan"]

    def read() -> Any:
        return ShardedBuild(folder, what, plan).done()

    check_mutants(data, files, outside, read, ...)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@fuzzed(300)
def test_flat_index(stores, outside, dtype, data):
    queries = np.load(stores / "flat" / "queries.npy", allow_pickle=False)

    def read() -> Any:
        scores, ids = FlatIPIndex.load(stores / "flat" / dtype, verify=True).search(queries, 5)
        return scores.tolist(), ids.tolist()

    errors = (ValueError, OSError)
    check_mutants(data, files_of(stores / "flat" / dtype), outside, read, read(), errors)
