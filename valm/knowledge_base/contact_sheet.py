"""Draws the results of a search as one figure."""

from __future__ import annotations

import functools
import subprocess
import textwrap

from PIL import Image, ImageDraw, ImageFont

from valm.knowledge_base.format import Item
from valm.knowledge_base.store import ImageKnowledgeBase

COLUMNS = 4
CELL = 160  # pixels; smaller thumbnails are enlarged
TEXT_LINES = 3
FONT_SIZE = 12
MARGIN = 8
LAST_LATIN = 0x24F  # Pillow's own font covers no other scripts


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
    draw.text((MARGIN, MARGIN), title, "black", font_for(title, FONT_SIZE + 2))
    for number, (score, item) in enumerate(results):
        left = MARGIN + number % columns * width
        top = 2 * MARGIN + line + number // columns * height
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="lightgrey")
        small = kb.thumbnail(item.id)
        if small is not None:
            scale = CELL / max(small.size)
            small = small.resize([max(1, round(side * scale)) for side in small.size], Image.Resampling.BICUBIC)
            sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        caption = item.caption.partition("\n")[0] or item.uri
        wrapped = textwrap.wrap(caption, int(CELL / (FONT_SIZE * 0.55)), max_lines=TEXT_LINES, placeholder="…")
        text = "\n".join([f"{number + 1}.  {score:.3f}", *wrapped])
        draw.multiline_text((left, top + CELL + 2), text, "black", font_for(text, FONT_SIZE), spacing=2)
    return sheet


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; for a text beyond Latin, a system font that has its first such character."""
    beyond = next((character for character in text if ord(character) > LAST_LATIN and not character.isspace()), None)
    file = None if beyond is None else _system_font(beyond)
    if file is not None:
        try:
            return ImageFont.truetype(file[0], size, index=file[1])
        except OSError:  # of fixed sizes, such as an emoji font
            pass
    return ImageFont.load_default(size)


@functools.lru_cache(1024)
def _system_font(character: str) -> tuple[str, int] | None:
    """File and index of a font that has the character; None without fontconfig."""
    asked = ["fc-match", "--format=%{file}\n%{index}", f":charset={ord(character):x}:scalable=true:color=false"]
    try:
        file, index = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return file, int(index)
