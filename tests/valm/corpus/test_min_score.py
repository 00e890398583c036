import re
from types import SimpleNamespace

import pytest
import torch

from tests.valm.other_tokenizers import gpt2_like, qwen_like
from tests.valm.tiny_clip import TEXTS
from valm.corpus import min_score
from valm.corpus.min_score import find_min_score
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
def test_texts_of_either_kind(clip, make_kb, text_file, made, query):
    encoder = ContextEncoder(clip, tokenizer=None if made is None else made(), query=query)
    retriever = Retriever(encoder, make_kb(30), 2)
    rows = [retriever.find([line])[1][0].numpy() for line in text_file.read_text().split("\n")]
    for source, kind in (("questions", "questions"), ("ordinary_text", "text")):
        found = find_min_score(retriever, **{source: text_file})
        assert found == pytest.approx(choose_min_score(**{kind: rows}), abs=1.1e-4)


def test_the_captions_of_the_knowledge_base(retriever, monkeypatch):
    kb = retriever.kb
    captions = ["" if image == 5 else f"{TEXTS[image % len(TEXTS)]} {image}" for image in range(len(kb))]
    monkeypatch.setattr(kb, "item", lambda image: SimpleNamespace(caption=f"{captions[image]}\nanother"))
    rows = [retriever.find([caption])[1][0].numpy() for caption in captions if caption]
    assert find_min_score(retriever) == pytest.approx(choose_min_score(questions=rows), abs=1.1e-4)
    monkeypatch.setattr(min_score, "CAPTIONS", 3)
    some = [rows[0], rows[13], rows[28]]  # of the images 0, 14 and 29
    assert find_min_score(retriever) == pytest.approx(choose_min_score(questions=some), abs=1.1e-4)
    monkeypatch.setattr(kb, "item", lambda image: SimpleNamespace(caption=""))
    with pytest.raises(ValmError, match=re.escape(f"{kb.path} has no captions to choose min_score from: name texts")):
        find_min_score(retriever)


def test_a_long_text_is_read_whole(retriever, tmp_path):
    """In batches: the documents of one are padded to its longest."""
    texts = [TEXTS[0], " ".join(TEXTS * 4)]
    (tmp_path / "long.txt").write_text("\n".join(texts * 70))
    found = find_min_score(retriever, ordinary_text=tmp_path / "long.txt")
    rows = [retriever.find([text])[1][0].numpy() for text in texts] * 70
    assert found == pytest.approx(choose_min_score(text=rows), abs=1.1e-4) and torch.tensor(found).isfinite()
