import re
from types import SimpleNamespace

import pytest
import torch

from tests.valm.other_tokenizers import gpt2_like, qwen_like
from tests.valm.tiny_clip import TEXTS
from valm.corpus.min_score import find_min_score
from valm.corpus.retrieved import retrieve_corpus
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.min_score import choose_min_score, set_min_score
from valm.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def retriever(clip, make_kb):
    return Retriever(ContextEncoder(clip), make_kb(30), 2)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join([*TEXTS, *TEXTS[:1]]))
    return tmp_path / "text.txt"


@pytest.mark.parametrize("query", ["eot", "state"])
@pytest.mark.parametrize("made", [None, gpt2_like, qwen_like], ids=["CLIP", "bos is eos", "no bos"])
def test_texts_and_what_was_retrieved_of_them_give_the_same(clip, make_kb, tmp_path, text_file, made, query):
    """The eos behind a text in a corpus is none of its tokens, and has another query, or begins the next document."""
    encoder = ContextEncoder(clip, tokenizer=None if made is None else made(), query=query)
    retriever = Retriever(encoder, make_kb(30), 2)
    lines = text_file.read_text().split("\n")
    rows = [retriever.find([line])[1][0].numpy() for line in lines]
    corpus = retrieve_corpus(lines, retriever, tmp_path / "corpus", progress=False)
    for source, kind in (("questions", "questions"), ("ordinary_text", "text")):
        expected = choose_min_score(**{kind: rows})
        live = find_min_score(retriever.kb, query, encoder.tokenizer, retriever, **{source: text_file})
        stored = find_min_score(retriever.kb, query, encoder.tokenizer, None, **{source: corpus.path})
        assert live == pytest.approx(expected, abs=1.1e-4) and stored == pytest.approx(expected, abs=1.1e-4)
    other = {"eot": "state", "state": "eot"}[query]
    with pytest.raises(ValmError, match=f"was retrieved with {query!r} queries, and the model has {other!r} ones"):
        find_min_score(retriever.kb, other, encoder.tokenizer, None, questions=corpus.path)


def test_what_cannot_be_chosen_from_is_named(retriever, make_kb, tmp_path, text_file):
    with pytest.raises(ValmError, match=re.escape(f"retrieve {text_file} too, and give that folder")):
        find_min_score(retriever.kb, "eot", retriever.encoder.tokenizer, None, questions=text_file)
    bare = retrieve_corpus(TEXTS, retriever, tmp_path / "bare", scores=False, progress=False)
    with pytest.raises(ValmError, match="has no retrieval scores: retrieve it again, `valm retrieve CORPUS --kb KB"):
        find_min_score(retriever.kb, "eot", retriever.encoder.tokenizer, retriever, ordinary_text=bare.path)
    with pytest.raises(ValmError, match="was read with another tokenizer than the model's"):
        find_min_score(retriever.kb, "eot", gpt2_like(), retriever, questions=bare.path)
    with pytest.raises(ValmError, match="was retrieved from another knowledge base"):
        find_min_score(make_kb(5), "eot", retriever.encoder.tokenizer, retriever, questions=bare.path)


def test_it_is_set_where_a_model_retrieves(retriever):
    class Model:
        def __init__(self, retrieves, retriever=None):
            self.fusion_options = SimpleNamespace(retrieves=retrieves)
            self.retriever, self.found = retriever, []

        def set_min_score(self, value):
            self.found.append(value)

    seeing = Model(True, retriever)
    set_min_score(seeing, 0.5, "model")
    assert seeing.found == [0.5]
    without = Model(False)
    with pytest.warns(UserWarning, match="--min-score changes nothing of twin, which retrieves no images"):
        set_min_score(without, 0.5, "twin")
    assert without.found == []


def test_a_long_text_is_read_whole(retriever, tmp_path):
    """In batches: the documents of one are padded to its longest."""
    (tmp_path / "long.txt").write_text("\n".join([TEXTS[0], " ".join(TEXTS * 4)] * 70))
    file = tmp_path / "long.txt"
    found = find_min_score(retriever.kb, "eot", retriever.encoder.tokenizer, retriever, ordinary_text=file)
    rows = [retriever.find([text])[1][0].numpy() for text in (TEXTS[0], " ".join(TEXTS * 4))] * 70
    assert found == pytest.approx(choose_min_score(text=rows), abs=1.1e-4) and torch.tensor(found).isfinite()
