import json
import math
import os
from pathlib import Path

import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.models import tiny_model
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer, tokenize_documents
from valm.errors import ValmError
from valm.evaluation.language import LAST_WORD, last_word, token_log_probs, windows
from valm.evaluation.metrics import document_metrics
from valm.evaluation.questions import FAIR, PUBLISHED, Documents
from valm.evaluation.scorers import CausalScorer
from valm.evaluation.sets import SETS
from valm.training.collate import Collator

DATA = os.environ.get("VALM_EVAL_DATA")
TEXTS = ["the sea is blue and the sun is red", "a red sun", "the sea", "blue is the sea and red is the sunset"]
TOKENIZER = prune_tokenizer(clip_tokenizer(), ["the sea is blue and the sun is red a"])


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id, num_images=0)


def nats(model, documents, batch_size=16):
    return -sum(float(row.sum()) for row in token_log_probs(model, documents, batch_size)[0])


def of_passages(model, passages, protocol=FAIR):
    asked = Documents("lambada", protocol, tuple(passages), last_word=True)
    scores = CausalScorer(model, TOKENIZER, "").documents(asked)
    return document_metrics(asked, {name: values[None] for name, values in scores.items()})


def test_each_text_is_read_alone_and_all_together_are_the_training_loss(model):
    documents = tokenize_documents(TEXTS, TOKENIZER)
    found = nats(model, documents, batch_size=2)
    alone = 0.0
    for document in documents:
        ids = torch.tensor([document])
        alone -= model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).double().sum().item()
    assert_agree(found, alone)
    batch = Collator(TOKENIZER, None)([{"input_ids": document} for document in documents])
    tokens = sum(len(document) - 1 for document in documents)
    assert_agree(found / tokens, model(**batch).loss.item())


def test_a_model_without_its_images_is_refused():
    with pytest.raises(ValmError, match="set a retriever first"):
        token_log_probs(tiny_model(vocab_size=len(TOKENIZER)), [[1, 2]], 1)


def test_lambada_counts_the_passages_whose_last_word_the_model_knows():
    passages = ["the sea is blue", "red is the sunset", "a sun and a blues"]
    model = tiny_model(vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id, num_images=0).train()
    batch = Collator(TOKENIZER, None)([{"input_ids": document} for document in tokenize_documents(passages, TOKENIZER)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    assert len(TOKENIZER("sunset", add_special_tokens=False)["input_ids"]) > 1
    known = of_passages(model, passages)
    assert known["accuracy"]["value"] == 1 and known["target_perplexity"]["value"] < 4
    other = ["the sea is red", "red is the suns", "a sun and a blue"]  # the last begins as the known word does
    assert of_passages(model, other)["accuracy"]["value"] == 0
    assert of_passages(model, [*passages, *other])["accuracy"]["value"] == 0.5


def test_published_lambada_scores_the_last_token_without_sot(model):
    passage = "the sea is sunset"
    ids = TOKENIZER(passage, add_special_tokens=False, return_tensors="pt")["input_ids"]
    log_probs = model(ids[:, :-1]).logits[0, -1].log_softmax(-1)
    result = of_passages(model, [passage], PUBLISHED)
    expected = math.exp(-log_probs[ids[0, -1]].item())
    assert_agree(result["target_perplexity"]["value"], expected)
    assert result["accuracy"]["value"] == (log_probs.argmax() == ids[0, -1])
    assert of_passages(model, [passage])["target_perplexity"]["value"] != pytest.approx(expected)


@pytest.mark.parametrize("passage", ["sea", "the sea is big !"])
def test_a_passage_without_a_last_word_is_named(tmp_path, passage):
    (tmp_path / "lambada.jsonl").write_text('{"text": "the sea is big"}\n' + json.dumps({"text": passage}))
    with pytest.raises(ValmError, match=rf"lambada\.jsonl, line 2: a passage must end in a word .*, got '{passage}'"):
        SETS["lambada"].load(tmp_path / "lambada.jsonl")
    with pytest.raises(ValmError, match="must end in a word"):
        last_word(TOKENIZER, passage)


@pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")
def test_last_words_of_the_real_set_are_of_several_tokens_as_often_as_published():
    passages = SETS["lambada"].load(Path(DATA) / "eval/lambada/lambada_test.jsonl")
    tokenizer = clip_tokenizer()
    words = [LAST_WORD.search(passage)[0] for passage in passages]
    several = sum(len(ids) > 1 for ids in tokenizer(words, add_special_tokens=False)["input_ids"])
    assert (len(passages), several) == (5153, 656)


def test_windows_score_every_token_once_with_half_a_context_before_it():
    for length in (2, 7, 8, 9, 31):
        found = windows(length, 8)
        assert [n for _, end, scored in found for n in range(scored, end)] == list(range(1, length))
        assert all(end - start <= 8 and (start == 0 or scored - start >= 4) for start, end, scored in found)
    assert windows(20, 8) == [(0, 8, 1), (4, 12, 8), (8, 16, 12), (12, 20, 16)]
    assert windows(4, 2) == [(0, 2, 1), (1, 3, 2), (2, 4, 3)]
    with pytest.raises(ValmError, match="at least 2 tokens at once"):
        windows(4, 1)


def test_a_text_longer_than_the_context_is_read_in_windows(model):
    (document,) = tokenize_documents([" ".join(TEXTS * 3)], TOKENIZER)
    assert len(document) > 2 * model.config.n_positions
    found = nats(model, [document, document[:10]], batch_size=2)
    expected = nats(model, [document[:10]])
    for start, end, scored in windows(len(document), model.config.n_positions):
        ids = torch.tensor([document[start:end]])
        log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).double()
        expected -= log_probs[scored - start - 1 :].sum().item()
    assert_agree(found, expected)
