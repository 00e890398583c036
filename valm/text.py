"""Prepares text for files, tables and error messages."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterable

# The handler of decoding errors for `encoding_of`: the five bytes that Windows-1252 does not define are read as in
# Latin-1, as browsers read them. Other errors stay errors.
UNDEFINED_AS_LATIN_1 = "valm.undefined_as_latin_1"


def _undefined_as_latin_1(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError) and error.encoding == "charmap":  # Python's name of cp1252 in errors
        return error.object[error.start : error.end].decode("latin-1"), error.end
    raise error


codecs.register_error(UNDEFINED_AS_LATIN_1, _undefined_as_latin_1)


def utf8(text: str) -> str:
    """The text with everything replaced that UTF-8 cannot encode: undecodable bytes of file names, and lone surrogates
    from JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:  # rare, and slower to look for than to meet
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def encoding_of(chunks: Iterable[bytes]) -> str:
    """The encoding of a text: UTF-8, UTF-16 or UTF-32 by its byte order mark, UTF-8 if all of it is valid, else
    Windows-1252, in which every byte is a character if errors are handled by UNDEFINED_AS_LATIN_1. Latin-1 itself
    would read the ellipsis and the curly quotes of Windows as control characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for number, chunk in enumerate(chunks):
        if number == 0 and (wide := _wide_encoding(chunk)):
            return wide
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError:
            return "cp1252"
    return "cp1252" if decoder.getstate()[0] else "utf-8-sig"


def decoded(content: bytes) -> str:
    """The text of `content`, decoded as `encoding_of` says. What is invalid in UTF-16 or UTF-32 is
    replaced."""
    encoding = encoding_of([content])
    return content.decode(encoding, errors=UNDEFINED_AS_LATIN_1 if encoding == "cp1252" else "replace")


def split_lines(text: str) -> list[str]:
    """The lines of a text, which end in a line feed, a carriage return or both. `str.splitlines` also splits at form
    feeds and at the separators of Unicode, which may stand within a text."""
    return re.split("\r\n|\n|\r", text)


def _wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, if the content begins with its byte order mark; that of UTF-32 begins with that of UTF-16."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def why_no_text(content: bytes) -> str | None:
    """Why the beginning of a file is not that of a UTF-8 text, as the end of a sentence; None if it may be one."""
    if wide := _wide_encoding(content):
        return f"is {wide.upper()}, expected UTF-8: convert it, such as by `iconv -f {wide.upper()} -t UTF-8`"
    begin = content.removeprefix(codecs.BOM_UTF8).lstrip()[:16].lower()
    if begin.startswith(b"<!--"):  # of HTML, or of Markdown
        begin = content.partition(b"-->")[2].lstrip()[:16].lower()
    if begin.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is HTML or XML, expected plain text: save its text as .txt"
    if begin.startswith((b"%pdf-", b"{\\rtf")):
        return "is a PDF or RTF document, expected plain text: save its text as .txt"
    if b"\0" in content:
        return (
            "is not UTF-8 text: it has NUL bytes, as UTF-16 and binary files have; convert it if it is text, "
            "else leave it out"
        )
    return None


def one_line(text: str) -> str:
    """The text without line breaks and repeated blanks."""
    return " ".join(text.split())


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, of cells in Markdown: a `|` in them is written `\\|`."""
    columns = list(head)
    every = (columns, ["---"] * len(columns), *rows)
    return "\n".join(" ".join(["|", *(f"{cell} |".lstrip() for cell in cells)]) for cells in every)


def printable(text: str) -> str:
    """The text, safe for a terminal: on one line, with escapes for characters that control the terminal, reorder the
    line (bidirectional controls) or cannot be written."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """The suffix ", did you mean ...?" with the known name most similar to `name`, and with one that is about as
    similar; empty if none is."""
    found = difflib.get_close_matches(name, list(known), n=2)
    if not found:
        return ""
    first, *others = (difflib.SequenceMatcher(None, other, name).ratio() for other in found)
    about = [found[0]] + [other for other, ratio in zip(found[1:], others, strict=True) if first - ratio < 0.1]
    return f", did you mean {' or '.join(about)}?"
