"""Definitions with a colour word in dictionaries that Debian packages bring, for natural text without templates.

apt-get download wordnet-base dict-gcide
for package in *.deb; do dpkg -x "$package" definitions; done
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from studies.color.words import COLOR_WORDS, words
from valm.errors import ValmError
from valm.store.files import cannot_read, read_text

WORDNET, GCIDE = Path("usr/share/wordnet"), Path("usr/share/dictd/gcide.dict.dz")
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
# Words of a definition. Longer ones of GCIDE are several, or an article.
WORDS = (5, 45)
# Of GCIDE, the share of a definition's characters that are letters and common punctuation: others have markup.
GCIDE_LETTERS = 0.97


class Definition(NamedTuple):
    """names: those of one thing, none in GCIDE."""

    names: tuple[str, ...]
    gloss: str

    def __str__(self) -> str:
        return f"{', '.join(self.names)}: {self.gloss}." if self.names else self.gloss


def color_definitions(folder: Path) -> list[Definition]:
    """The definitions with a colour word of WordNet and GCIDE, each once.

    Args:
        folder: what the packages wordnet-base and dict-gcide were unpacked into.

    Raises:
        ValmError: a dictionary is missing, or cannot be read.
    """
    for place in (folder / WORDNET / "data.noun", folder / GCIDE):
        if not place.is_file():
            raise ValmError(
                f"there is no {place}: unpack Debian's packages wordnet-base and dict-gcide into {folder}, as "
                "studies/color/definitions.py says"
            )
    least, most = WORDS
    found = [
        one
        for one in (*_wordnet(folder / WORDNET), *_gcide(folder / GCIDE))
        if COLOR_WORDS & set(words(one.gloss)) and least <= len(words(one.gloss)) <= most
    ]
    return list({one.gloss.lower(): one for one in found}.values())


def _wordnet(folder: Path) -> Iterator[Definition]:
    for part in PARTS_OF_SPEECH:
        for line in read_text(folder / f"data.{part}").splitlines():
            fields, bar, gloss = line.partition(" | ")
            if line.startswith(" ") or not bar:  # the licence
                continue
            split = fields.split()
            count = int(split[3], 16)
            names = [re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in split[4 : 4 + 2 * count : 2]]
            yield Definition(tuple(names), re.split(r'; "', gloss.strip())[0])  # without its examples


def _gcide(file: Path) -> Iterator[Definition]:
    try:
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as opened:
            text = opened.read()
    except (OSError, EOFError) as error:
        raise cannot_read(file, error) from error
    for paragraph in re.split(r"\n\s*\n", text):
        plain = re.sub(r"\[[^\]]*\]|[{}]", "", " ".join(paragraph.split()))
        for part in re.split(r"(?:^|\s)(?:\d+\.|\([a-z]\))\s", plain):
            # the field of use in front, and the notes behind
            gloss = re.sub(r"^\s*(?:--\s*)?(?:\([A-Z][A-Za-z.& ]*\)\s*)?", "", part)
            gloss = re.split(r" --| Note:", gloss)[0].strip()
            letters = sum(sign.isalpha() or sign in " ,.;'-" for sign in gloss)
            sentence = gloss[:1].isupper() and gloss[-1:] in (".", ";") and not gloss.startswith("Syn")
            if sentence and "\\" not in gloss and letters >= GCIDE_LETTERS * len(gloss):
                yield Definition((), gloss)
