"""Draws the results of a search as one figure."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import subprocess
import textwrap
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from valm.knowledge_base.format import Item
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.text import one_line, utf8

COLUMNS = 4
CELL = 160  # pixels; smaller thumbnails are enlarged
TEXT_LINES = 3
FONT_SIZE = 12
MARGIN = 8
NO_CHARACTER = "\U0010ffff"  # no font has it


def contact_sheet(kb: ImageKnowledgeBase, results: list[tuple[float, Item]], title: str) -> Image.Image:
    """The thumbnails of `results` (from `Retriever.search`) in rows, each with its score and caption below.

    An image without a thumbnail is an empty frame.
    """
    line = FONT_SIZE + 3
    width, height = CELL + MARGIN, CELL + MARGIN + (1 + TEXT_LINES) * line
    columns = min(COLUMNS, max(1, len(results)))
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * width, 2 * MARGIN + line + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    _draw_text(draw, MARGIN, MARGIN, title, FONT_SIZE + 2)
    for number, (score, item) in enumerate(results):
        left = MARGIN + number % columns * width
        top = 2 * MARGIN + line + number // columns * height
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="lightgrey")
        small = kb.thumbnail(item.id)
        if small is not None:
            scale = CELL / max(small.size)
            small = small.resize([max(1, round(side * scale)) for side in small.size], Image.Resampling.BICUBIC)
            sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        for row, text in enumerate([f"{number + 1}.  {score:.3f}", *_wrapped(caption_of(item))]):
            _draw_text(draw, left, top + CELL + 2 + row * line, text, FONT_SIZE)
    return sheet


def caption_of(item: Item) -> str:
    """What stands below an image: the first line of its caption, or where it is from."""
    return item.caption.partition("\n")[0] or item.uri


def undrawable(text: str) -> str:
    """The characters of the text that no font here has, each once; the sheet has question marks for them."""
    return "".join(dict.fromkeys(character for character in _composed(text) if _font(character, FONT_SIZE) is None))


def _composed(text: str) -> str:
    """The text on one line, with one character for a letter and its accent, which file names of macOS have apart."""
    return unicodedata.normalize("NFC", one_line(utf8(text)))


def _wrapped(text: str) -> list[str]:
    """The lines of a caption, none wider than CELL."""
    for columns in range(CELL // 3, 1, -1):
        lines = textwrap.wrap(text, columns, max_lines=TEXT_LINES, placeholder="…")
        if all(sum(font.getlength(run) for font, run in _runs(line, FONT_SIZE)) <= CELL for line in lines):
            break
    return lines


def _draw_text(draw: ImageDraw.ImageDraw, left: float, top: float, text: str, size: int) -> None:
    for font, run in _runs(text, size):
        draw.text((left, top + size), run, "black", font, anchor="ls")  # fonts share the baseline, not the top
        left += font.getlength(run)


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in parts of one font each, with question marks for what no font has."""
    runs: list[tuple[ImageFont.FreeTypeFont, str]] = []
    for character in _composed(text):
        font = _font(character, size)
        if font is None:
            font, character = _fonts(size)[0], "?"
        if runs and (runs[-1][0] is font or character.isspace()):
            runs[-1] = (runs[-1][0], runs[-1][1] + character)
        else:
            runs.append((font, character))
    return runs


@functools.lru_cache(4096)
def _font(character: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The first font that has the character: DejaVu or Pillow's own, else one of the system; None without any."""
    for font in _fonts(size):
        if _has(font, character):
            return font
    file = _system_font(character)
    if file is None:
        return None
    try:
        font = _opened(*file, size)
    except OSError:  # of fixed sizes, such as an emoji font
        return None
    return font if _has(font, character) else None


@functools.lru_cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """DejaVu of the system or of matplotlib, where there is one, and Pillow's own font, which has no accents."""
    files = ["DejaVuSans.ttf"]
    if (matplotlib := importlib.util.find_spec("matplotlib")) is not None and matplotlib.origin is not None:
        files.append(f"{os.path.dirname(matplotlib.origin)}/mpl-data/fonts/ttf/DejaVuSans.ttf")
    fonts = []
    for file in files:
        with contextlib.suppress(OSError):
            fonts.append(_opened(file, 0, size))
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)  # as it is for a size
    return [*fonts, own]


@functools.lru_cache
def _opened(file: str, index: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, index=index)


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font has the character: what it draws is not the box of missing ones."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(NO_CHARACTER))


@functools.lru_cache(1024)
def _system_font(character: str) -> tuple[str, int] | None:
    """File and index of a font that has the character; None without fontconfig."""
    asked = ["fc-match", "--format=%{file}\n%{index}", f":charset={ord(character):x}:scalable=true:color=false"]
    try:
        file, index = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return file, int(index)
