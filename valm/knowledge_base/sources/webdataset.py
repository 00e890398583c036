"""Images in tar files, as img2dataset and webdataset write them."""

from __future__ import annotations

import os
import re
import tarfile
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from valm.clip.read_image import IMAGE_SUFFIXES, UNREAD_SUFFIXES, unread_formats
from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, parse_caption
from valm.knowledge_base.format import EncodedShard
from valm.knowledge_base.records import Encoding, Record
from valm.knowledge_base.sources import SourceShard, fingerprint_files
from valm.store.files import cannot_read, is_transient
from valm.store.shards import Progress
from valm.text import one_line

if TYPE_CHECKING:
    from valm.clip.clip import Clip

# Bytes after the last member of an archive that are checked to be zero: tar itself pads with a few thousand.
END_BYTES = 1 << 20
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$", re.IGNORECASE)


class WebdatasetSource:
    """The images in tar files; one shard for each file.

    Nothing is unpacked, so any names in an archive are safe. A truncated or damaged archive is read up to the damage
    and listed as skipped. So are damaged images and caption files, all but the last of several images of one name,
    links to images, and an image with another dot in its name that belongs to no other.

    Args:
        tars: a folder of `*.tar` files, one file, or several. Members whose names agree up to the first dot belong
            together: an image, and its caption in `.txt` or under `caption` in `.json`.

    Raises:
        ValmError: there is no tar file.
    """

    precomputed = False

    def __init__(self, tars: str | os.PathLike | Iterable[str | os.PathLike]):
        if isinstance(tars, str | os.PathLike):
            path = Path(tars)
            tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
            if not tars:
                raise ValmError(f"no tar files in {path}; looked for files ending in .tar")
            if path.is_dir() and (others := sorted(file for file in path.iterdir() if COMPRESSED.search(file.name))):
                warnings.warn(
                    f"{path} has {len(others)} compressed archives, such as {others[0].name}, which are not read: "
                    "uncompress them to .tar",
                    stacklevel=2,
                )
        self.tars = [Path(tar).absolute() for tar in tars]

    @property
    def count(self) -> int:
        return len(self.tars)

    def plan(self) -> dict[str, Any]:
        return {"source": "webdataset", "fingerprint": fingerprint_files(self.tars)}

    def files(self) -> Iterable[Path]:
        return self.tars

    def images(self) -> Iterable[Record]:
        return (record for tar in self.tars for record in tar_records(tar))

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        return (partial(encode_tar, tar) for tar in self.tars)


def encode_tar(tar: Path, clip: Clip, encoding: Encoding, progress: Progress) -> EncodedShard:
    from valm.knowledge_base.encode import encode_records

    return encode_records(tar_records(tar), clip, encoding, progress)


def tar_records(path: Path) -> list[Record]:
    """The images of a tar file with their captions, then records without an image for what is damaged.

    Raises:
        ValmError: a transient error (`is_transient`) while the archive is read.
    """
    images: dict[str, tarfile.TarInfo] = {}
    captions: dict[tuple[str, str], str] = {}
    damaged: list[Record] = []
    others: list[tuple[str, str, str]] = []  # such as the mask beside an image, 0.mask.png

    def skip(name: str, reason: str) -> None:
        damaged.append(Record(name, "", None, reason=reason))

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would read this one again
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                name = PurePosixPath(member.name)
                stem, _, extension = name.name.partition(".")
                key, suffix = str(name.parent / stem), f".{extension.lower()}"
                uri = f"{path.name}/{member.name}"
                last = name.suffix.lower()
                if not member.isfile() or suffix not in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES):
                    if member.issym() or member.islnk():
                        if last in IMAGE_SUFFIXES:
                            skip(uri, f"a link to {member.linkname}, which is not followed")
                    elif name.name.startswith("."):
                        pass  # as in a folder
                    elif member.isfile() and last in UNREAD_SUFFIXES:
                        skip(uri, unread_formats([last])[0])
                    elif member.isfile() and last in IMAGE_SUFFIXES:
                        others.append((key, uri, suffix))
                    continue
                if member.issparse():
                    skip(uri, "stored as a sparse file, which a few bytes make as large as they like")
                elif suffix in IMAGE_SUFFIXES:
                    if key in images:
                        skip(f"{path.name}/{images[key].name}", f"{member.name} comes after it in its place")
                    images[key] = member
                else:
                    opened = tar.extractfile(member)
                    assert opened is not None  # None only for a link or a folder
                    try:
                        captions[key, suffix] = parse_caption(opened.read(MAX_CAPTION_BYTES + 1), suffix)
                    except ValueError as error:
                        skip(uri, str(error))
            # tarfile accepts a damaged or empty header as the end, and a missing end
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(END_BYTES)
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise tarfile.ReadError(f"at byte {tar.offset:,} there is neither a member nor the end of the archive")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if is_transient(error):
            raise cannot_read(path, one_line(str(error))) from error
        skip(path.name, f"the archive ends early: {one_line(str(error))}")
    for key, uri, suffix in others:
        if key not in images:
            skip(uri, f"named {suffix} from the first dot on, expected an image's suffix alone")
    records = []
    for key, member in images.items():
        caption = next(filter(None, (captions.get((key, suffix)) for suffix in CAPTION_SUFFIXES)), "")
        records.append(Record(f"{path.name}/{member.name}", caption, path, member.offset_data, member.size))
    return records + damaged
