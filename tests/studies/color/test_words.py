"""Names and colours in text: the filter that keeps the answers of the test sets out of what is trained on."""

import pytest

from studies.color.words import COLOR_WORDS, Names, head_noun, name_forms, synonyms, word_forms, wordnet, words


@pytest.mark.parametrize(
    ("one", "many"),
    [("cherry", "cherries"), ("leaf", "leaves"), ("knife", "knives"), ("box", "boxes"), ("tooth", "teeth"),
     ("goose", "geese"), ("rose", "roses"), ("boy", "boys")],
)  # fmt: skip
def test_singular_and_plural_find_each_other(one, many):
    assert many in word_forms(one)
    assert one in word_forms(many)


def test_words_and_head_nouns():
    assert words("Black-and-white, 2 PEN'S.") == ("black", "and", "white", "pen", "s")
    assert head_noun("polar bear") == "bear"
    assert ("pine", "trees") in name_forms("pine tree")
    assert ("pines", "tree") not in name_forms("pine tree")


def test_wordnet_comes_with_names_and_glosses():
    assert len(wordnet()) == 21841
    assert "eggplant" in synonyms("aubergines")
    assert synonyms("no such thing at all") == set()


@pytest.mark.parametrize(
    "text",
    [
        "The tomato is red.",
        "Ripe TOMATOES, all of them reddish",
        "a purple eggplant",  # a synonym of the item
        "an ice bear is white",
        "An orange is orange.",
        "yellow-green oranges",
    ],
)
def test_a_name_beside_a_colour_is_found(text):
    names = Names(["tomato", "aubergine", "polar bear", "orange"])
    assert names.beside_color(text)


@pytest.mark.parametrize(
    "text",
    [
        "The tomato is ripe.",  # no colour
        "The carrot is orange.",  # the colour alone, though an orange is an item
        "A brown bear.",  # the head noun alone
        "red automaton",
        "",
    ],
)
def test_other_texts_are_not(text):
    names = Names(["tomato", "aubergine", "polar bear", "orange"])
    assert not names.beside_color(text)


def test_head_nouns_where_asked_for():
    assert Names(["polar bear"], head_nouns=True).beside_color("Brown bears.")
    assert not Names(["bear"], head_nouns=True).beside_color("a brown fox")


def test_colours_and_letters_are_no_names():
    # ViComTe asks for the colours of "red", "black" and "i"
    names = Names(["red", "black", "i", "t"])
    assert not names.beside_color("t is red and black, i is white")
    assert {"grey", "gray", "silver", "bluish", "reddest"} <= COLOR_WORDS
