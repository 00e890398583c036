"""The text of the demo: captions without colours, and a small corpus that never names a held-out object's colour."""

from __future__ import annotations

import random
from collections.abc import Sequence

# People who draw or photograph a picture rarely name its colour. A caption is a lead, an article, a name and perhaps a
# tail, cut after a random word: the text tower also reads the beginnings of sentences.
LEADS = (
    "",
    "",
    "",
    "a picture of",
    "a drawing of",
    "a photo of",
    "this is",
    "here is",
    "look at",
    "i saw",
    "there was",
    "the shape of",
    "the size of",
    "the name of",
    "the usual size of",
    "the typical shape of",
    "the common name of",
    "what is",
    "what is the usual name of",
    "what is the shape of",
    "where is",
    "q : what is the size of",
    "a good picture of",
    "we talked about",
    "the best kind of",
)
ARTICLES = ("a", "the", "", "one", "this")
TAILS = (
    "",
    "",
    "? it is big .",
    "? a : it is here .",
    "is on the table .",
    "usually has a place in the house .",
    "has the shape of a toy .",
    "and its color .",
    "in the usual color .",
    "was in the street yesterday .",
    "for children .",
    "icon , simple drawing .",
)

# {x} is the object with its article, {c} its colour. Four of the nine evaluation prompts are the beginning of one of
# these sentences. The words of the other five prompts occur here in other sentences.
COLOR_SENTENCES = (
    "the color of {x} is {c} .",
    "the typical color of {x} is {c} .",
    "the normal color of {x} is {c} .",
    "the usual color for {x} is {c} .",
    "the common color for {x} is {c} .",
    "the color of {x} is usually {c} .",
    "the most common color of {x} is {c} .",
    "what is the color of {x} ? it is {c} .",
    "what is the typical color of {x} ? {c} .",
    "what is the usual color for {x} ? {c} .",
    "what is the common color of {x} ? it is {c} .",
    "q : what color is {x} ? a : it is {c} .",
    "q : what is the typical color of {x} ? a : it is {c} .",
    "q : what is the main color of {x} ? a : {c} .",
    "what color is {x} ? {c} .",
    "{x} is {c} .",
    "{x} is usually {c} .",
    "{x} has the color {c} .",
    "{x} often has the color of {c} .",
    "{x} usually has a color like {c} .",
    "i painted {x} , of course it is {c} .",
    "everybody knows that {x} is {c} .",
)
OTHER_SENTENCES = (
    "i saw {x} in the street yesterday .",
    "{x} was on the table .",
    "where is {x} ? it is in the house .",
    "she drew {x} and he liked it .",
    "the usual place of {x} is the garden .",
    "the common name of {x} is short .",
    "what is the usual size of {x} ? it is small .",
    "q : what is the name of {x} ? a : i do not know .",
    "{x} usually has the shape of a toy .",
    "we talked about {x} all day .",
    "can you find {x} in this picture ?",
    "this story is about {x} and its friend .",
)
SENTENCE_ARTICLES = ("the", "the", "a", "this", "")


def caption(name: str, rng: random.Random) -> str:
    """A caption for a picture of `name`, cut after a random word of its tail."""
    tail = rng.choice(TAILS).split()
    words = [rng.choice(LEADS), rng.choice(ARTICLES), name, *tail[: rng.randint(0, len(tail))]]
    return " ".join(word for word in words if word)


def training_sentences(
    colors: dict[str, str], silent: list[str], count: int, rng: random.Random, *, color_share: float = 0.5
) -> list[str]:
    """Sentences about objects. Some objects have their colour named, the others never.

    Args:
        colors: the colour word of each object whose colour is named.
        silent: the held-out objects, which occur only in sentences without a colour.
        count: number of sentences.
        color_share: share of the sentences that name a colour.
    """
    spoken, everything = sorted(colors), sorted([*colors, *silent])
    sentences = []
    for _ in range(count):
        if rng.random() < color_share:
            name = rng.choice(spoken)
            sentences.append(_fill(rng.choice(COLOR_SENTENCES), name, rng, c=colors[name]))
        else:
            sentences.append(_fill(rng.choice(OTHER_SENTENCES), rng.choice(everything), rng))
    return sentences


def _fill(template: str, name: str, rng: random.Random, **words: str) -> str:
    return template.format(x=f"{rng.choice(SENTENCE_ARTICLES)} {name}".strip(), **words)


def begins_a_sentence(prompt: str) -> bool:
    """Whether some training sentences begin with this evaluation prompt."""
    begin = prompt.lower().replace("[descriptor] [item]", "{x}")
    for sign in "?:":
        begin = begin.replace(sign, f" {sign}")
    return any(template.startswith(f"{begin} ") for template in COLOR_SENTENCES)


def all_texts(names: list[str], colors: Sequence[str]) -> list[str]:
    """Texts that together contain every word of the captions and sentences."""
    templates = [template.format(x="", c="") for template in COLOR_SENTENCES + OTHER_SENTENCES]
    return [*names, *colors, *templates, *LEADS, *ARTICLES, *TAILS, *SENTENCE_ARTICLES]
