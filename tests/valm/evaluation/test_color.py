import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.valm.models import tiny_model
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.evaluation import color
from valm.evaluation.color import COLORS, PROMPTS, ColorItem, evaluate_color, fill, load_color_terms, load_memory_color

TOKENIZER = prune_tokenizer(clip_tokenizer(), [*PROMPTS, " ".join(COLORS), "sea sun cat snow"])
ITEMS = [
    ColorItem("sun", "yellow", "the"),
    ColorItem("sea", "blue", "the"),
    ColorItem("cat", "black", "a"),
    ColorItem("snow", "white", ""),
    ColorItem("polar bear", "white", "a"),
]

DATA = os.environ.get("VALM_EVAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")


def a_model(**arguments):
    ids = {"vocab_size": len(TOKENIZER), "bos_token_id": TOKENIZER.bos_token_id, "num_images": 0}
    return tiny_model(**(ids | arguments))


def answering(monkeypatch, score):
    """Replaces the model: score(prompt, answer) is the log-probability. Returns the texts that were asked."""
    asked = []

    def log_probs(model, tokenizer, prompts, answers, **arguments):
        asked.append(prompts)
        return torch.tensor([[float(score(prompt, answer)) for answer in answers] for prompt in prompts])

    monkeypatch.setattr(color, "answer_log_probs", log_probs)
    return asked


@needs_data
def test_memory_color_is_as_published():
    items = load_memory_color(Path(DATA) / "eval/object_color/memory_color_data.csv")
    counts = {"white": 25, "green": 19, "yellow": 18, "red": 11, "grey": 8, "brown": 8, "black": 7, "blue": 4}
    assert Counter(item.color for item in items) == counts | {"purple": 3, "pink": 3, "orange": 3}
    assert len(items) == 109
    assert items[1] == ColorItem("ocean", "blue", "the")
    assert Counter(item.descriptor for item in items)[""] == 54


@needs_data
def test_color_terms_is_as_published():
    items = load_color_terms(Path(DATA) / "eval/object_color/color-concrete-objects.csv")
    counts = {"white": 10, "brown": 10, "green": 9, "grey": 6, "black": 6, "yellow": 4, "red": 3, "blue": 2}
    assert Counter(item.color for item in items) == counts | {"pink": 1, "orange": 1}
    assert items[1] == ColorItem("banana", "yellow", None)


def test_all_answers_right_and_all_wrong(monkeypatch):
    right = {item.item: item.color for item in ITEMS}
    answering(monkeypatch, lambda prompt, answer: any(n in prompt and c == answer for n, c in right.items()))
    result = evaluate_color(None, TOKENIZER, ITEMS)
    assert result.accuracy.value == result.vote.value == result.calibrated.value == result.calibrated_vote.value == 1
    assert (result.accuracy.low, result.accuracy.high) == (1, 1)
    assert (result.majority, result.majority_answer) == (0.4, "white")
    assert result.predictions == tuple((item.color,) * 9 for item in ITEMS)
    answering(monkeypatch, lambda prompt, answer: answer == "purple")
    assert evaluate_color(None, TOKENIZER, ITEMS).accuracy.value == 0


def test_a_thing_is_asked_for_with_its_descriptor(monkeypatch):
    asked = answering(monkeypatch, lambda prompt, answer: 0)
    items = [
        ColorItem("banana", "yellow"),
        ColorItem("fur", "white", "the inside of a"),
        ColorItem("snow", "white", ""),
    ]
    evaluate_color(None, TOKENIZER, items)
    (texts,) = asked
    assert texts[0] == "Q: What is the color of the banana? A: It is"
    assert texts[9 + 4] == "The color of the inside of a fur is"
    assert texts[18 + 8] == "snow usually has the color of"
    assert fill(PROMPTS[0], "banana", None, fair=False) == "Q: What is the color of [DESCRIPTOR] banana? A: It is"


def test_with_a_real_model_it_is_reproducible_and_writes_json():
    first = evaluate_color(a_model(), TOKENIZER, ITEMS)
    again = evaluate_color(a_model(), TOKENIZER, ITEMS, batch_size=3)
    assert first == again
    written = json.loads(json.dumps(first.to_json()))
    assert written["accuracy"]["value"] == first.accuracy.value
    assert written["items"][0] == {"item": "sun", "color": "yellow", "descriptor": "the"}
    assert len(written["predictions"]) == 5 and len(written["predictions"][0]) == 9


def test_calibration_takes_out_an_answer_that_is_always_likely(monkeypatch):
    def score(prompt, answer):
        return {"green": 9, "yellow": "sun" in prompt, "blue": "sea" in prompt}.get(answer, 0)

    answering(monkeypatch, score)
    result = evaluate_color(None, TOKENIZER, ITEMS[:2])
    assert result.accuracy.value == result.vote.value == 0
    assert result.calibrated.value == result.calibrated_vote.value == 1
    assert result.predictions == (("green",) * 9,) * 2


def test_balanced_accuracy_does_not_reward_the_frequent_answer(monkeypatch):
    answering(monkeypatch, lambda prompt, answer: answer == "white")
    result = evaluate_color(None, TOKENIZER, [ITEMS[0], ITEMS[3], ITEMS[4], ITEMS[4]])
    assert result.accuracy.value == result.majority == 0.75
    assert (result.balanced, result.majority_answer) == (0.5, "white")


@pytest.mark.parametrize(
    "items, arguments, message",
    [
        ([], {}, "no items"),
        (ITEMS, {"prompts": []}, "no prompts"),
        (ITEMS, {"prompts": ["the color is"]}, r"has no \[ITEM\]"),
        ([ColorItem("sea", "turquoise")], {}, "the answer 'turquoise' is not one of white"),
    ],
)
def test_wrong_arguments_are_named(items, arguments, message):
    with pytest.raises(ValmError, match=message):
        evaluate_color(a_model(), TOKENIZER, items, **arguments)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_memory_color(tmp_path / "nothing.csv")
    (tmp_path / "other.csv").write_text("thing,colour\nsea,blue\n")
    with pytest.raises(ValmError, match=r"has the columns \['thing', 'colour'\], expected"):
        load_color_terms(tmp_path / "other.csv")
