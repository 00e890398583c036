"""No caption names a colour, and no sentence says the colour of a held-out thing."""

import random

import pytest

from studies.demo.corpus import (
    ARTICLES,
    COLOR_SENTENCES,
    LEADS,
    OTHER_SENTENCES,
    TAILS,
    begins_a_sentence,
    caption,
    training_sentences,
)
from studies.demo.things import COLORS
from valm.evaluation.questions import COLOR_PROMPTS

SPOKEN = {"tomato": "red", "banana": "yellow", "swan": "white", "pear": "green"}
SILENT = ["cherry", "blood", "sheep", "frog"]


def words(text: str) -> set[str]:
    return set(text.split())


def test_no_caption_names_a_color():
    rng = random.Random(0)
    captions = [caption("frog", rng) for _ in range(2000)]
    assert all("frog" in words(text) for text in captions)
    assert not any(words(text) & set(COLORS) for text in captions)
    assert len(set(captions)) > 500
    assert not words(" ".join([*LEADS, *ARTICLES, *TAILS])) & set(COLORS)


def test_colors_of_silent_things_are_never_said():
    sentences = training_sentences(SPOKEN, SILENT, 4000, random.Random(0))
    for sentence in sentences:
        if words(sentence) & set(SILENT):
            assert not words(sentence) & set(COLORS), sentence
    assert {name for name in SILENT if any(name in words(text) for text in sentences)} == set(SILENT)


def test_a_said_color_is_the_things_own():
    said = [text for text in training_sentences(SPOKEN, SILENT, 2000, random.Random(1)) if words(text) & set(COLORS)]
    for sentence in said:
        (name,) = words(sentence) & set(SPOKEN)
        assert words(sentence) & set(COLORS) == {SPOKEN[name]}
    assert 0.4 < len(said) / 2000 < 0.6


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_color_share(share):
    sentences = training_sentences(SPOKEN, SILENT, 200, random.Random(2), color_share=share)
    assert sum(bool(words(text) & set(COLORS)) for text in sentences) == 200 * share


def test_sentences_are_the_same_for_a_seed():
    first, again, other = (training_sentences(SPOKEN, SILENT, 100, random.Random(seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_templates_without_a_color_name_none():
    assert not words(" ".join(OTHER_SENTENCES)) & set(COLORS)
    assert all("{c}" in template for template in COLOR_SENTENCES)


def test_the_evaluation_also_asks_in_words_that_no_sentence_begins_with():
    assert [begins_a_sentence(prompt) for prompt in COLOR_PROMPTS] == [0, 1, 0, 1, 1, 0, 0, 1, 0]
