"""Definitions of WordNet and GCIDE in the formats of Debian's packages."""

import gzip

import pytest

from studies.color.definitions import GCIDE, WORDNET, color_definitions
from valm.errors import ValmError

NOUNS = """\
  1 This software and database is being provided under a licence with red in it | not a line of data
00001740 03 n 02 kettle 0 tea_kettle 0 000 | a grey pot that boils water for tea; "the red kettle was on the stove"
00001741 03 n 01 stone 0 000 | a hard thing that nobody has painted so far
"""
ADJECTIVES = "00002000 00 a 01 ruddy(p) 0 000 | inclined to a healthy reddish color of the face\n"
ARTICLES = """\
Kettle \\Ket"tle\\, n. [OE. ketel.] 1. A vessel of a blue metal in which water is boiled.
     2. A pot without any words for what it looks like at all.

Syn: Red pots, green pots, blue pots, and all the others.
"""


def write(folder):
    (folder / WORDNET).mkdir(parents=True)
    for part, lines in (("noun", NOUNS), ("verb", ""), ("adj", ADJECTIVES), ("adv", "")):
        (folder / WORDNET / f"data.{part}").write_text(lines)
    (folder / GCIDE).parent.mkdir(parents=True)
    (folder / GCIDE).write_bytes(gzip.compress(ARTICLES.encode()))


def test_definitions_with_a_colour_and_the_names_that_they_are_of(tmp_path):
    write(tmp_path)
    assert list(map(str, color_definitions(tmp_path))) == [
        "kettle, tea kettle: a grey pot that boils water for tea.",
        "ruddy: inclined to a healthy reddish color of the face.",
        "A vessel of a blue metal in which water is boiled.",
    ]


def test_a_missing_dictionary_is_named_with_the_packages(tmp_path):
    with pytest.raises(ValmError, match=r"data.noun: unpack Debian's packages wordnet-base and dict-gcide"):
        color_definitions(tmp_path)
