"""Groups the files of a folder or an archive into samples: images with their captions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from valm.clip.read_image import IMAGE_SUFFIXES, unread_formats
from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_SUFFIXES, CaptionTable, parse_caption
from valm.knowledge_base.records import Record
from valm.store.files import cannot_read, is_transient
from valm.text import composed, one_line
from valm_kernels.json_files import short

# What Google Takeout adds to the name of an image: .json, or .supplemental-metadata.json, which it cuts if the name is
# long. The number of an image of the same name, as in a(1).jpg, stands behind: a.jpg(1).json.
TAKEOUT = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?:\.s[a-z-]*)?(\(\d+\))?$", re.IGNORECASE)


def at_last_dot(name: str) -> tuple[str, str]:
    """The key and the suffix of a file in a folder of images. The key of Takeout's metadata is the image's name."""
    key, suffix = os.path.splitext(composed(name))
    return TAKEOUT.sub(r"\2\1", key) if suffix.lower() == ".json" else key, suffix.lower()


def at_first_dot(name: str) -> tuple[str, str]:
    """The key and the suffix of a member of a webdataset archive."""
    path = PurePosixPath(composed(name))
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), f".{suffix.lower()}"


class Samples:
    """Images with their captions. An image's caption is in a file of the same key, or whose key is the image's name:
    `.txt` before `.json`.

    Args:
        names: all files.
        content: returns the content of a caption file. Its errors, of any type, list the file as damaged.
        split: returns the key and the suffix of a file.

    Attributes:
        images: the captions of each image, one a line, in the order of `names`; "" if there is none.
        damaged: why a caption file of an image cannot be read.
        keys: the keys and the names of the images.
        others: the files that are neither images nor captions of images.

    Raises:
        ValmError: a transient error (`is_transient`) while a caption file is read.
    """

    def __init__(
        self,
        names: Iterable[str],
        content: Callable[[str], bytes],
        split: Callable[[str], tuple[str, str]] = at_last_dot,
    ):
        parts = {name: split(name) for name in names}
        self.images = {name: "" for name, (_, suffix) in parts.items() if suffix in IMAGE_SUFFIXES}
        self.keys = {key for name in self.images for key in (parts[name][0], composed(name))}
        self.damaged: dict[str, str] = {}
        self.others = []
        files: dict[tuple[str, str], str] = {}
        for name, (key, suffix) in parts.items():
            if suffix in CAPTION_SUFFIXES and key in self.keys:
                files[key, suffix] = name
            elif suffix not in IMAGE_SUFFIXES:
                self.others.append(name)
        for name in self.images:
            keys = (parts[name][0], composed(name))
            beside = (files.get((key, suffix)) for suffix in CAPTION_SUFFIXES for key in keys)
            captions = (self._caption(file, content) for file in beside if file is not None)
            self.images[name] = next(filter(None, captions), "")

    def _caption(self, file: str, content: Callable[[str], bytes]) -> str:
        try:
            return parse_caption(content(file), PurePosixPath(file).suffix.lower())
        except Exception as error:  # readers of archives raise many types for damaged bytes
            if is_transient(error):
                raise cannot_read(file, one_line(str(error))) from error
            self.damaged[file] = one_line(str(error))
            return ""


def picture_records(
    samples: Samples, place: Path, record: Callable[[str, str], Record], table: CaptionTable | None
) -> tuple[list[Record], list[str]]:
    """The records of the images in a folder or archive, and remarks on other files, on images without a caption
    and on rows without an image.

    Args:
        record: makes the record of an image with its caption.
        table: the captions of images that have none.

    Raises:
        ValmError: there are no images, or `table` names an image by a file name that several images have.
    """
    ignored = Counter(os.path.splitext(name)[1].lower() for name in samples.others)
    if not samples.images:
        raise no_images(place, ignored)
    unnamed = [] if table is None else table.add_to(samples.images)
    records = [record(image, caption) for image, caption in samples.images.items()]
    records += [Record(file, "", None, reason=reason) for file, reason in samples.damaged.items()]
    remarks = []
    if ignored:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(ignored.items()))
        remarks.append("; ".join([f"files ignored: {kinds}", *unread_formats(ignored)]))
    if without := list(samples.images.values()).count(""):
        remarks.append(f"{without:,} of {len(samples.images):,} images have no caption")
    if table is not None and unnamed:
        remarks.append(f"{len(unnamed):,} rows of {table.path.name} name no image, such as {short(unnamed[0])}")
    return records, remarks


def no_images(place: Path, suffixes: Iterable[str]) -> ValmError:
    """The error for a folder or archive that contains only files with these `suffixes`."""
    unread = "".join(f"; {remark}" for remark in unread_formats(suffixes))
    return ValmError(
        f"no images in {place}: looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))}, in folders below it too"
        f"{unread}"
    )
