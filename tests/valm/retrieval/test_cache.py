import json
import os

import numpy as np
import pytest
import torch

from tests.valm.retrieval.tiny_clip import TEXTS
from valm.errors import ValmError
from valm.retrieval import cache
from valm.retrieval.cache import NO_IMAGE, CorpusRetrieval, retrieve_corpus
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def retriever(clip, make_kb):
    return Retriever(ContextEncoder(clip), make_kb(20), 4)


@pytest.fixture(scope="module")
def documents(tokenizer):
    eot = tokenizer.eos_token_id
    texts = [*TEXTS, "a dog.", "a red apple lies on", TEXTS[1] + TEXTS[0]]
    return [[*tokenizer(text)["input_ids"], eot] for text in texts]


@pytest.fixture(scope="module")
def corpus(documents, retriever, tmp_path_factory):
    return retrieve_corpus(documents, retriever, tmp_path_factory.mktemp("corpus"), progress=False)


def test_a_document_has_the_pictures_it_has_alone(corpus, documents, retriever):
    assert len(corpus) == len(documents)
    for index, document in enumerate(documents):
        found = retriever(torch.tensor([document]))
        expected = found.image_ids[found.image_index[0]]
        assert corpus[index]["input_ids"].tolist() == document
        assert corpus[index]["image_ids"].tolist() == expected.tolist()
    with pytest.raises(IndexError, match="documents go from 0 to 4, got 5"):
        corpus[5]


def test_batching_changes_nothing(corpus, documents, retriever, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BATCH_TOKENS", 1)
    one_by_one = retrieve_corpus(documents, retriever, tmp_path / "out", progress=False)
    assert np.array_equal(one_by_one.image_ids, corpus.image_ids)


def test_the_files(corpus, documents):
    path = corpus.path
    assert sorted(os.listdir(path)) == ["document_offsets.npy", "image_ids.npy", "manifest.json", "tokens.npy"]
    assert isinstance(CorpusRetrieval.open(path).image_ids, np.memmap)
    assert corpus.image_ids.dtype == np.uint32
    assert (corpus.image_ids != NO_IMAGE).all()
    assert corpus.manifest["tokens"] == sum(map(len, documents))


def test_another_knowledge_base_is_refused(corpus, retriever, make_kb):
    corpus.check_knowledge_base(retriever.kb)
    with pytest.raises(ValmError, match="was retrieved from another knowledge base"):
        corpus.check_knowledge_base(make_kb(21))


def test_a_failure_leaves_nothing(documents, retriever, tmp_path, monkeypatch):
    monkeypatch.setattr(Retriever, "nearest", lambda self, queries: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retrieve_corpus(documents, retriever, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_wrong_input(documents, retriever, tmp_path):
    with pytest.raises(ValmError, match="the corpus has no documents"):
        retrieve_corpus([], retriever, tmp_path / "out")
    with pytest.raises(ValmError, match="the corpus has an empty document"):
        retrieve_corpus([[1], []], retriever, tmp_path / "out")
    (tmp_path / "x").write_text("")
    with pytest.raises(ValmError, match="is not empty"):
        retrieve_corpus(documents, retriever, tmp_path)


def test_damage_is_named(corpus, tmp_path):
    with pytest.raises(ValmError, match=r"it has no manifest\.json"):
        CorpusRetrieval.open(tmp_path)
    for name in os.listdir(corpus.path):
        (tmp_path / name).write_bytes((corpus.path / name).read_bytes())
    content = (tmp_path / "image_ids.npy").read_bytes()
    (tmp_path / "image_ids.npy").write_bytes(content[:-8])
    with pytest.raises(ValmError, match=r"is damaged: image_ids\.npy"):
        CorpusRetrieval.open(tmp_path)
    (tmp_path / "image_ids.npy").write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "k": 5}))
    with pytest.raises(ValmError, match=r"image_ids\.npy holds uint32 \(\d+, 4\), the manifest says uint32 \(\d+, 5\)"):
        CorpusRetrieval.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(ValmError, match="has format version 9, this valm reads 1"):
        CorpusRetrieval.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValmError, match="is not the manifest of a corpus retrieval"):
        CorpusRetrieval.open(tmp_path)
