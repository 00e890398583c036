"""Names of objects in text: word forms, head nouns, synonyms in WordNet, and the words for colours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from valm.errors import ValmError

# The words of a name or a sentence; a hyphen separates two words.
_WORD = re.compile(r"[a-z]+")

# Colour words, with two that occur only in ViComTe. The endings below make further colour words, such as "reddish".
_COLORS = (
    "white", "yellow", "green", "red", "grey", "gray", "brown", "black", "blue", "purple", "pink", "orange", "silver",
)  # fmt: skip
_ENDINGS = ("", "s", "ish", "er", "est", "ness", "y")
_IRREGULAR_COLORS = (
    "whiter", "whitest", "whitish", "redder", "reddest", "reddish", "bluer", "bluish", "bluest", "purplish", "silvered",
)  # fmt: skip
COLOR_WORDS = frozenset([color + ending for color in _COLORS for ending in _ENDINGS] + [*_IRREGULAR_COLORS])
# ViComTe asks for the colours of "red" and "i", and WordNet has "red" for a Marxist. Such words are not read as names.
_NO_NAMES = COLOR_WORDS - {"orange", "oranges"}
MIN_NAME_LETTERS = 3

# Irregular plurals of nouns that name objects.
_IRREGULAR_PLURALS = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tooth": "teeth",
    "woman": "women",
}
_IRREGULAR_SINGULARS = {plural: singular for singular, plural in _IRREGULAR_PLURALS.items()}


@dataclass(frozen=True)
class Synset:
    """A noun of WordNet: the names of one object, the most common first, and its definition."""

    names: tuple[str, ...]
    gloss: str


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation and numbers."""
    return tuple(_WORD.findall(text.lower()))


def word_spans(text: str) -> list[tuple[str, tuple[int, int]]]:
    """The `words` of a text with their spans, (first character, one past the last)."""
    return [(found.group(), found.span()) for found in _WORD.finditer(text.lower())]


def head_noun(name: str) -> str:
    """The last word of a name: "bear" of "polar bear"."""
    return words(name)[-1]


def word_forms(word: str) -> set[str]:
    """A word and its possible singulars and plurals. Some of these do not exist, and match nothing."""
    forms = {word, f"{word}s", f"{word}es"}
    if word in _IRREGULAR_PLURALS:
        forms.add(_IRREGULAR_PLURALS[word])
    if word in _IRREGULAR_SINGULARS:
        forms.add(_IRREGULAR_SINGULARS[word])
    for singular, plural in (("y", "ies"), ("f", "ves"), ("fe", "ves"), ("", "s"), ("", "es")):
        if word.endswith(singular):
            forms.add(word.removesuffix(singular) + plural)
        if word.endswith(plural) and len(word) > len(plural) + 1:
            forms.add(word.removesuffix(plural) + singular)
    return forms


def name_forms(name: str) -> set[tuple[str, ...]]:
    """The words of a name, with its last word in the singular and the plural."""
    found = words(name)
    return {(*found[:-1], form) for form in word_forms(found[-1])} if found else set()


@cache
def wordnet() -> tuple[Synset, ...]:
    """The 21,841 nouns of WordNet with pictures in ImageNet, as listed by the package timm.

    Raises:
        ValmError: timm is missing.
    """
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ValmError(f"WordNet's nouns come with the package timm ({error}): pip install -e '.[study]'") from error
    synsets = []
    for description in ImageNetInfo("imagenet-22k").label_descriptions(detailed=True):
        names, _, gloss = description.partition(": ")
        synsets.append(Synset(tuple(names.split(", ")), gloss))
    return tuple(synsets)


@cache
def _synsets_by_name() -> dict[tuple[str, ...], list[Synset]]:
    found: dict[tuple[str, ...], list[Synset]] = {}
    for synset in wordnet():
        for name in synset.names:
            found.setdefault(words(name), []).append(synset)
    return found


def synonyms(name: str) -> set[str]:
    """All names of the WordNet nouns with this name, in the singular or the plural."""
    by_name = _synsets_by_name()
    return {other for form in name_forms(name) for synset in by_name.get(form, ()) for other in synset.names}


class Names:
    """Finds names of objects in text: each name, its plural and singular, and its synonyms in WordNet.

    Colour words and names of fewer than MIN_NAME_LETTERS letters are ignored.

    Args:
        names: the names.
        head_nouns: also find the last words of the names, "bear" of "polar bear".
    """

    def __init__(self, names: Iterable[str], *, head_nouns: bool = False):
        self.names = tuple(names)
        spoken = {other for name in self.names for other in (name, *synonyms(name))}
        if head_nouns:
            spoken |= {head_noun(name) for name in self.names if words(name)}
        spoken = {name.lower() for name in spoken if len(name) >= MIN_NAME_LETTERS}
        self._forms = {form for name in spoken - _NO_NAMES for form in name_forms(name)}
        self._lengths = sorted({len(form) for form in self._forms})

    def spans(self, text: tuple[str, ...]) -> list[range]:
        """The positions of the names in the words of a text (see `words`)."""
        return [
            range(start, start + length)
            for length in self._lengths
            for start in range(len(text) - length + 1)
            if text[start : start + length] in self._forms
        ]

    def __contains__(self, text: str) -> bool:
        """Whether a text contains one of the names."""
        return bool(self.spans(words(text)))

    def beside_color(self, text: str) -> bool:
        """Whether a text contains one of the names and a colour word.

        One word cannot be both: a single "orange" is either the fruit or the colour.
        """
        found = words(text)
        colors = [place for place, word in enumerate(found) if word in COLOR_WORDS]
        return bool(colors) and any(place not in span for span in self.spans(found) for place in colors)
