"""Pictures and captions in a folder: which there are, and how one is read."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from valm.errors import ValmError
from valm.files import cannot_read, check_regular, is_passing
from valm.text import one_line

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
# The formats of these. Pillow goes by the content whatever the name, and would hand PostScript to Ghostscript.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_TABLES = ("captions.csv", "captions.txt", "captions.json")
FILE_COLUMNS = ("image", "file", "filename", "file_name", "path", "uri")
CAPTION_COLUMNS = ("caption", "text", "description")

# A picture of more pixels is refused before it is decoded: a file of a few kilobytes can claim gigabytes.
MAX_PIXELS = 1 << 26
# So is one whose sides are further apart: CLIP enlarges the shorter one to its own size, and the longer one with it.
MAX_ASPECT = 64
# A larger file beside a picture is no caption.
MAX_CAPTION_BYTES = 1 << 20


def find_pictures(folder: Path) -> list[str]:
    """Paths of all pictures under `folder`, relative to it, with forward slashes and in sorted order.

    A picture is a file with one of PICTURE_SUFFIXES. Hidden files and folders are left out, links to folders
    are not followed. Raises ValmError where the folder is missing or has no picture, or one below it cannot be read.
    """
    if not folder.is_dir():
        raise ValmError(f"no folder {folder}" if not folder.exists() else f"{folder} is not a folder")

    def unreadable(error: OSError) -> None:
        raise cannot_read(f"the folder {error.filename}", error.strerror) from error

    found = []
    for directory, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith("."):
                found.append((Path(directory) / name).relative_to(folder).as_posix())
    if not found:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        raise ValmError(f"no pictures in {folder}; looked for files ending in {suffixes}, in folders below it too")
    return sorted(found)


def read_picture(source: str | os.PathLike | BinaryIO | Image.Image) -> Image.Image:
    """The picture in RGB, upright (EXIF orientation applied), what is transparent on white.

    Raises ValueError for a picture of more than MAX_PIXELS, longer than MAX_ASPECT times its width or the other way
    round, or in none of PICTURE_FORMATS, and whatever Pillow raises for one it cannot read.
    """
    with warnings.catch_warnings():
        # Pillow warns at a limit of its own, after the header; ours is lower and refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = source if isinstance(source, Image.Image) else Image.open(source, formats=PICTURE_FORMATS)
        except UnidentifiedImageError as error:  # its own message has an object's address in it
            raise ValueError(f"not a picture in one of the formats {', '.join(PICTURE_FORMATS)}") from error
    with picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")


def thumbnail_bytes(picture: Image.Image, size: int) -> bytes:
    """A JPEG of the picture whose longer side is at most `size` pixels."""
    small = picture.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def read_captions(
    folder: Path, pictures: list[str], table: Path | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """The caption of each picture that has one, where it has several one on each line; and of each caption file beside
    a picture that is damaged, what is wrong with it.

    Looked for in this order: `NAME.txt` beside the picture; `caption` in `NAME.json` beside it (what
    img2dataset writes); a table of captions. The table is `table`, or else `captions.csv`, `captions.txt`
    (as Flickr8k has it: a CSV with the header `image,caption`) or `captions.json` (an object from file name to
    caption or list of captions) in the folder; it names pictures by path or by file name alone.
    Raises ValmError for a table that cannot be read.
    """
    tables = [folder / name for name in CAPTION_TABLES]
    if table is None:
        table = next((file for file in tables if file.is_file()), None)
    else:
        check_regular(table)
        tables.append(table)
    by_name: dict[str, list[str]] = {}
    if table is not None:
        by_name = _read_json_table(table) if table.suffix == ".json" else _read_csv_table(table)

    captions, damaged = {}, {}
    for picture in pictures:
        path = folder / picture
        caption = ""
        for file in map(path.with_suffix, CAPTION_SUFFIXES):
            try:
                caption = caption or (_read_caption_beside(file) if file not in tables else "")
            except ValmError:
                raise
            except ValueError as error:
                damaged[file.relative_to(folder).as_posix()] = str(error)
        caption = caption or "\n".join(by_name.get(picture) or by_name.get(path.name) or [])
        if caption:
            captions[picture] = caption
    return captions, damaged


def parse_caption(content: bytes, suffix: str) -> str:
    """The caption in a `.txt` file, or as `caption` in a `.json` one (img2dataset writes null there for none): its
    lines, without blanks. Raises ValueError for JSON that is damaged, and for more than MAX_CAPTION_BYTES."""
    if len(content) > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption file of more than {MAX_CAPTION_BYTES:,} bytes, which is left out")
    text = content.decode("utf-8", errors="replace")
    if suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for thousands of brackets
            raise ValueError(f"a caption file that is not JSON: {error}") from error
        text = value.get("caption") if isinstance(value, dict) else None
        if not isinstance(text, str):
            return ""
    return "\n".join(line for line in map(one_line, text.splitlines()) if line)


def _read_caption_beside(file: Path) -> str:
    """As `parse_caption`; empty where there is no such file, which is the usual case."""
    try:
        if not file.is_file():
            return ""
        with open(file, "rb") as opened:
            content = opened.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        if is_passing(error):
            raise cannot_read(file, error.strerror) from error
        return ""
    return parse_caption(content, file.suffix)


def _read_csv_table(table: Path) -> dict[str, list[str]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
            columns = {name.strip().lower(): name for name in reader.fieldnames or []}
            file_column = next((columns[name] for name in FILE_COLUMNS if name in columns), None)
            caption_column = next((columns[name] for name in CAPTION_COLUMNS if name in columns), None)
            if file_column is None or caption_column is None:
                raise ValmError(
                    f"the caption table {table} starts with {header.strip()[:60]!r}; expected a header with a column "
                    f"{' or '.join(FILE_COLUMNS)} and a column {' or '.join(CAPTION_COLUMNS)}"
                )
            captions: dict[str, list[str]] = {}
            for row in reader:
                caption = one_line(row[caption_column] or "")
                if row[file_column] and caption:
                    captions.setdefault(row[file_column].strip(), []).append(caption)
            return captions
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}") from error


def _read_json_table(table: Path) -> dict[str, list[str]]:
    try:
        value = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}") from error
    if not isinstance(value, dict):
        raise ValmError(f"the caption table {table} holds a {type(value).__name__}; expected an object from file names")
    captions = {}
    for name, caption in value.items():
        lines = caption if isinstance(caption, list) else [caption]
        if not all(isinstance(line, str) for line in lines):
            raise ValmError(f"the caption of {name!r} in {table} is neither a string nor a list of strings")
        captions[name] = [line for line in map(one_line, lines) if line]
    return captions
