import json
import os
from pathlib import Path

import pytest
import torch

from tests.valm.models import tiny_model
from valm.errors import ValmError
from valm.evaluation import size
from valm.evaluation.size import PROMPTS, evaluate_size, load_size_pairs
from valm.tokenizer import clip_tokenizer, prune_tokenizer

DATA = os.environ.get("VALM_EVAL_DATA")
PAIRS = [("bus", "cat"), ("cat", "fly"), ("bus", "fly")]
ORDER = ("bus", "cat", "fly")


def answering(monkeypatch, margin):
    """Replaces the model: margin(first, second) is log p(yes) - log p(no). Returns the texts that were asked."""
    asked = []

    def log_probs(model, tokenizer, texts, answers, **arguments):
        asked.append((texts, arguments["bos"]))
        things = [[word for word in ORDER if word in text] for text in texts]
        margins = [margin(*sorted(two, key=text.index)) for text, two in zip(texts, things, strict=True)]
        return torch.tensor([[float(value), 0.0] for value in margins])

    monkeypatch.setattr(size, "answer_log_probs", log_probs)
    return asked


@pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")
def test_the_set_has_486_pairs_of_41_objects():
    pairs = load_size_pairs(Path(DATA) / "eval/object_size/sizePairsFull.txt")
    assert (len(pairs), len({thing for pair in pairs for thing in pair})) == (486, 41)
    assert pairs[0] == ("aeroplane", "apple")


def test_always_yes_is_perfect_as_published_and_chance_in_the_fair_protocol(monkeypatch):
    asked = answering(monkeypatch, lambda first, second: 1)
    assert evaluate_size(None, None, PAIRS, protocol="published").accuracy.value == 1
    fair = evaluate_size(None, None, PAIRS)
    assert (fair.accuracy.value, fair.both_orders.value, fair.said_yes) == (0.5, 0, 1)
    (published, bos), (both, fair_bos) = asked
    assert (len(published), bos, len(both), fair_bos) == (3 * 4, False, 3 * 6 * 2, True)
    assert published[3].count("bus is") == 3  # three questions in one
    assert both[:2] == ["Is bus bigger than cat?", "Is cat bigger than bus?"]


def test_preferred_sees_through_a_fondness_for_yes(monkeypatch):
    answering(monkeypatch, lambda first, second: 10 + ORDER.index(second) - ORDER.index(first))
    result = evaluate_size(None, None, PAIRS)
    assert (result.accuracy.value, result.preferred.value) == (0.5, 1)


def test_a_model_that_knows_is_right_in_both_orders(monkeypatch):
    answering(monkeypatch, lambda first, second: ORDER.index(second) - ORDER.index(first))
    result = evaluate_size(None, None, PAIRS)
    assert result.accuracy.value == result.both_orders.value == result.preferred.value == 1
    assert result.said_yes == 0.5


def test_with_a_real_model_it_is_reproducible():
    tokenizer = prune_tokenizer(clip_tokenizer(), [*PROMPTS, "yes no"])
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, num_images=0, n_positions=64)
    result = evaluate_size(model, tokenizer, PAIRS)
    assert result == evaluate_size(model, tokenizer, PAIRS, batch_size=5)
    assert json.loads(json.dumps(result.to_json()))["pairs"][0] == ["bus", "cat"]


def test_wrong_input_is_named(tmp_path):
    (tmp_path / "pairs").write_text("bus cat\nbus\n")
    with pytest.raises(ValmError, match="line 2: expected two words, got 1"):
        load_size_pairs(tmp_path / "pairs")
    with pytest.raises(ValmError, match="no pairs"):
        evaluate_size(None, None, [])
    with pytest.raises(ValmError, match="protocol must be one of"):
        evaluate_size(None, None, PAIRS, protocol="other")
