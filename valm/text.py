"""Prepares text for files, tables and error messages."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable


def utf8(text: str) -> str:
    """Replaces what UTF-8 cannot encode: undecodable bytes of file names, and lone surrogates from JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:  # rare, and slower to look for than to meet
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def split_lines(text: str) -> list[str]:
    """Splits at line feeds, carriage returns or both. `str.splitlines` also splits at form feeds and at Unicode
    separators, which may occur within a line."""
    return re.split("\r\n|\n|\r", text)


def composed(name: str) -> str:
    """A name in composed Unicode (NFC). macOS may write é as e and an accent, another program as one letter."""
    return unicodedata.normalize("NFC", name)


def one_line(text: str) -> str:
    """The text without line breaks and repeated blanks."""
    return " ".join(text.split())


def first_half(text: str) -> str:
    """A prompt that the rest of `text` continues: the first half of its words, and at least three words."""
    words = text.split()
    return " ".join(words[: max(3, len(words) // 2)])


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown. The cells are Markdown too, so they must escape `|` as `\\|`."""
    columns = list(head)
    every = (columns, ["---"] * len(columns), *rows)
    return "\n".join(" ".join(["|", *(f"{cell} |".lstrip() for cell in cells)]) for cells in every)


def printable(text: str) -> str:
    """The text on one line, safe for a terminal: characters that control the terminal, reorder the line (bidirectional
    controls) or cannot be written are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """The suffix ", did you mean ...?" with the known name most similar to `name`, and a second name if it is about as
    similar. Empty if no name is similar."""
    found = difflib.get_close_matches(name, list(known), n=2)
    if not found:
        return ""
    first, *others = (difflib.SequenceMatcher(None, other, name).ratio() for other in found)
    about = [found[0]] + [other for other, ratio in zip(found[1:], others, strict=True) if first - ratio < 0.1]
    return f", did you mean {' or '.join(about)}?"
