"""No caption names a colour, and no sentence says the colour of a held-out thing."""

import random

from studies.demo.corpus import ARTICLES, LEADS, TAILS, begins_a_sentence, caption, training_sentences
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


def test_the_seed_and_the_color_share_decide():
    def drawn(seed, share):
        return training_sentences(SPOKEN, SILENT, 200, random.Random(seed), color_share=share)

    assert drawn(3, 0.5) == drawn(3, 0.5) != drawn(4, 0.5)
    for share in (0.0, 1.0):
        assert sum(bool(words(text) & set(COLORS)) for text in drawn(2, share)) == 200 * share
    assert [begins_a_sentence(prompt) for prompt in COLOR_PROMPTS] == [0, 1, 0, 1, 1, 0, 0, 1, 0]
