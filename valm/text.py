"""Text on its way into files, tables and error messages."""

from __future__ import annotations

import re


def utf8(text: str) -> str:
    """The text with what cannot be written as UTF-8 replaced: bytes of a file name that are none, and halves of
    characters that JSON can name."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def one_line(text: str) -> str:
    """The text without line breaks and repeated blanks."""
    return " ".join(text.split())


def printable(text: str) -> str:
    """The text as a terminal may show it: on one line, with escapes for characters that would steer the terminal,
    reorder the line (bidirectional controls) or cannot be written."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
