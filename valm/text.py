"""Prepares text for files, tables and error messages."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterable


def utf8(text: str) -> str:
    """The text with everything replaced that UTF-8 cannot encode: undecodable bytes of file names, and lone surrogates
    from JSON."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def encoding_of(chunks: Iterable[bytes]) -> str:
    """The encoding of a text: UTF-8, UTF-16 or UTF-32 by its byte order mark, UTF-8 if all of it is valid, else
    Latin-1, in which every byte is a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for number, chunk in enumerate(chunks):
        if number == 0 and (wide := _wide_encoding(chunk)):
            return wide
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError:
            return "latin-1"
    return "latin-1" if decoder.getstate()[0] else "utf-8-sig"


def decoded(content: bytes) -> str:
    """The text of `content`, decoded as `encoding_of` says. What is invalid in UTF-16 or UTF-32 is
    replaced."""
    return content.decode(encoding_of([content]), errors="replace")


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
