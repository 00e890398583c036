"""Text on its way into files, tables and error messages."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterable


def utf8(text: str) -> str:
    """The text with what cannot be written as UTF-8 replaced: bytes of a file name that are none, and halves of
    characters that JSON can name."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def encoding_of(chunks: Iterable[bytes]) -> str:
    """The name of the encoding that a text was written in: UTF-8 or UTF-16 by the mark it begins with, UTF-8 where all
    of it is that, else Latin-1, in which every byte is a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for number, chunk in enumerate(chunks):
        if number == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError:
            return "latin-1"
    return "latin-1" if decoder.getstate()[0] else "utf-8-sig"


def decoded(content: bytes) -> str:
    """A text in the encoding that `encoding_of` finds. What UTF-16 does not allow is replaced."""
    return content.decode(encoding_of([content]), errors="replace")


def one_line(text: str) -> str:
    """The text without line breaks and repeated blanks."""
    return " ".join(text.split())


def printable(text: str) -> str:
    """The text as a terminal may show it: on one line, with escapes for characters that would steer the terminal,
    reorder the line (bidirectional controls) or cannot be written."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" for the known name that is most like `name`, or nothing where none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {found[0]}?" if found else ""
