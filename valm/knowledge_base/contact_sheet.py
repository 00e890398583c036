"""Draws the results of a search as one figure."""

from __future__ import annotations

import functools
import textwrap
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from valm.knowledge_base.format import StoredImage
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.text import one_line, utf8

COLUMNS = 4
CELL = 160  # pixels; smaller thumbnails are enlarged
TEXT_LINES = 3
FONT_SIZE = 12
MARGIN = 8


def contact_sheet(kb: ImageKnowledgeBase, results: list[tuple[float, StoredImage]], title: str) -> Image.Image:
    """The thumbnails of `results` (from `Retriever.search`) in rows, each with its score and caption below.

    An image without a thumbnail is an empty frame, and an image without a caption shows its uri. The font is DejaVu if
    the system has it, otherwise Pillow's.
    """
    line = FONT_SIZE + 3
    width, height = CELL + MARGIN, CELL + MARGIN + (1 + TEXT_LINES) * line
    columns = min(COLUMNS, max(1, len(results)))
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * width, 2 * MARGIN + line + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), _composed(title), "black", _font(FONT_SIZE + 2))
    for number, (score, item) in enumerate(results):
        left = MARGIN + number % columns * width
        top = 2 * MARGIN + line + number // columns * height
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="lightgrey")
        small = kb.thumbnail(item.id)
        if small is not None:
            scale = CELL / max(small.size)
            small = small.resize([max(1, round(side * scale)) for side in small.size], Image.Resampling.BICUBIC)
            sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        for row, text in enumerate(
            [f"{number + 1}.  {score:.3f}", *_wrapped(item.caption.partition("\n")[0] or item.uri)]
        ):
            draw.text((left, top + CELL + 2 + row * line), text, "black", _font(FONT_SIZE))
    return sheet


def _composed(text: str) -> str:
    """The text on one line, with a letter and its accent as one character: file names of macOS separate them."""
    return unicodedata.normalize("NFC", one_line(utf8(text)))


def _wrapped(text: str) -> list[str]:
    """A caption in lines that are at most CELL wide."""
    for columns in range(CELL // 3, 1, -1):
        lines = textwrap.wrap(_composed(text), columns, max_lines=TEXT_LINES, placeholder="…")
        if all(_font(FONT_SIZE).getlength(line) <= CELL for line in lines):
            break
    return lines


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:  # Pillow's font lacks accents
        own = ImageFont.load_default(size)
        assert isinstance(own, ImageFont.FreeTypeFont)  # as it is for a size
        return own
