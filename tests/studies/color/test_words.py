"""Names and colours in text: the filter that keeps the answers of the test sets out of what is trained on."""

import pytest

from studies.color.words import Names, head_noun, name_forms, word_forms, words


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


ITEMS = ["tomato", "aubergine", "polar bear", "orange"]


@pytest.mark.parametrize(
    ("items", "head_nouns", "text", "found"),
    [
        (ITEMS, False, "Ripe TOMATOES, all of them reddish", True),
        (ITEMS, False, "a purple eggplant", True),  # a synonym of the item
        (ITEMS, False, "an ice bear is white", True),
        (ITEMS, False, "An orange is orange.", True),
        (ITEMS, False, "The tomato is ripe.", False),
        (ITEMS, False, "The carrot is orange.", False),  # the colour alone, though an orange is an item
        (ITEMS, False, "A brown bear.", False),  # the head noun alone
        (ITEMS, False, "red automaton", False),
        (["polar bear"], True, "Brown bears.", True),
        (["bear"], True, "a brown fox", False),
        # ViComTe asks for the colours of "red", "black" and "i"
        (["red", "black", "i", "t"], False, "t is red and black, i is white", False),
    ],
)
def test_a_name_beside_a_colour(items, head_nouns, text, found):
    assert Names(items, head_nouns=head_nouns).beside_color(text) == found
