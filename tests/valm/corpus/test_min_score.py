import re
from types import SimpleNamespace

import pytest
import torch

from tests.valm.other_tokenizers import gpt2_like, qwen_like
from tests.valm.tiny_clip import TEXTS
from valm.corpus.min_score import MinScore
from valm.corpus.retrieved import retrieve_corpus
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.min_score import choose_min_score
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
        live = MinScore("auto", **{source: text_file}).find(retriever.kb, query, encoder.tokenizer, retriever)
        stored = MinScore("auto", **{source: corpus.path}).find(retriever.kb, query, encoder.tokenizer, None)
        assert live == pytest.approx(expected, abs=1.1e-4) and stored == pytest.approx(expected, abs=1.1e-4)
    other = {"eot": "state", "state": "eot"}[query]
    with pytest.raises(ValmError, match=f"was retrieved with {query!r} queries, and the model has {other!r} ones"):
        MinScore("auto", questions=corpus.path).find(retriever.kb, other, encoder.tokenizer, None)


def test_a_number_is_itself(retriever):
    assert MinScore(0.25).find(retriever.kb, "eot", retriever.encoder.tokenizer, None) == 0.25


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": "auto"}, "give either --questions or --ordinary-text"),
        ({"score": "auto", "questions": "a", "ordinary_text": "b"}, "give either --questions or --ordinary-text"),
        ({"score": 0.5, "questions": "a"}, "give --min-score auto with them"),
        ({"score": "high"}, "--min-score must be a number or auto, got 'high'"),
    ],
)
def test_options_that_do_not_go_together(retriever, given, message):
    with pytest.raises(ValmError, match=message):
        MinScore(**given).find(retriever.kb, "eot", retriever.encoder.tokenizer, retriever)


def test_what_cannot_be_chosen_from_is_named(retriever, make_kb, tmp_path, text_file):
    with pytest.raises(ValmError, match=re.escape(f"retrieve {text_file} too, and give that folder")):
        MinScore("auto", questions=text_file).find(retriever.kb, "eot", retriever.encoder.tokenizer, None)
    bare = retrieve_corpus(TEXTS, retriever, tmp_path / "bare", scores=False, progress=False)
    with pytest.raises(ValmError, match="has no retrieval scores: retrieve it again, `valm retrieve CORPUS --kb KB"):
        MinScore("auto", ordinary_text=bare.path).find(retriever.kb, "eot", retriever.encoder.tokenizer, retriever)
    with pytest.raises(ValmError, match="was read with another tokenizer than the model's"):
        MinScore("auto", questions=bare.path).find(retriever.kb, "eot", gpt2_like(), retriever)
    with pytest.raises(ValmError, match="was retrieved from another knowledge base"):
        MinScore("auto", questions=bare.path).find(make_kb(5), "eot", retriever.encoder.tokenizer, retriever)


def test_it_is_set_where_a_model_retrieves(retriever):
    class Model:
        def __init__(self, retrieves, retriever=None):
            self.fusion_options = SimpleNamespace(retrieves=retrieves)
            self.retriever, self.found = retriever, []

        def set_min_score(self, value):
            self.found.append(value)

    seeing = Model(True, retriever)
    MinScore(0.5).set(seeing, "model")
    assert seeing.found == [0.5]
    without = Model(False)
    with pytest.warns(UserWarning, match="--min-score changes nothing of twin, which retrieves no images"):
        MinScore(0.5).set(without, "twin")
    assert without.found == []
    with pytest.raises(ValmError, match="lost has no knowledge base"):
        MinScore("auto", questions="a.txt").set(Model(True), "lost")


def test_a_long_text_is_read_whole(retriever, tmp_path):
    """In batches: the documents of one are padded to its longest."""
    (tmp_path / "long.txt").write_text("\n".join([TEXTS[0], " ".join(TEXTS * 4)] * 70))
    found = MinScore("auto", ordinary_text=tmp_path / "long.txt").find(
        retriever.kb, "eot", retriever.encoder.tokenizer, retriever
    )
    rows = [retriever.find([text])[1][0].numpy() for text in (TEXTS[0], " ".join(TEXTS * 4))] * 70
    assert found == pytest.approx(choose_min_score(text=rows), abs=1.1e-4) and torch.tensor(found).isfinite()
