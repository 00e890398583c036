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
