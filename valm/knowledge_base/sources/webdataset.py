"""Images in tar files, as img2dataset and webdataset write them."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from valm.clip.read_image import IMAGE_SUFFIXES, UNREAD_SUFFIXES, unread_formats
from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_SUFFIXES, MAX_CAPTION_BYTES
from valm.knowledge_base.records import Encoding, Record
from valm.knowledge_base.sources import encode_list
from valm.knowledge_base.sources.samples import Samples, at_first_dot
from valm.store.files import cannot_read, is_transient
from valm.store.shards import Part, Progress
from valm.text import one_line
from valm_kernels.json_files import check_regular

if TYPE_CHECKING:
    from valm.clip.clip import Clip

# Bytes after the last member of an archive that are checked to be zero: tar itself pads with a few thousand.
END_BYTES = 1 << 20


class WebdatasetSource:
    """The images in tar files, one shard for each file.

    Nothing is unpacked, so any names in an archive are safe. A truncated or damaged archive is read up to the damage
    and listed as skipped. Also skipped and listed are damaged images and caption files, and images whose name belongs
    to no sample.

    Args:
        tars: a folder of `*.tar` files, one file, or several files. Members whose names agree up to the first dot
            belong together: images, and their caption in `.txt` or under `caption` in `.json`.

    Raises:
        ValmError: there is no tar file.
    """

    precomputed = False

    def __init__(self, tars: str | os.PathLike | Iterable[str | os.PathLike]):
        if isinstance(tars, str | os.PathLike):
            path = Path(tars)
            tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
            if not tars:
                raise ValmError(f"no tar files in {path}: looked for files ending in .tar, uncompressed")
        self.tars = [Path(tar).absolute() for tar in tars]

    @property
    def count(self) -> int:
        return len(self.tars)

    def plan(self) -> dict[str, Any]:
        return {"source": "webdataset"}

    def files(self) -> Iterable[Path]:
        return self.tars

    def images(self) -> Iterable[Record]:
        return (record for tar in self.tars for record in tar_records(tar))

    def parts(self) -> Iterator[Part]:
        return (Part(fingerprint_files([tar]), partial(encode_tar, tar)) for tar in self.tars)


def fingerprint_files(files: Iterable[Path]) -> str:
    """SHA-256 over the names and sizes of `files`. Raises OSError if a file is missing, or a pipe or device."""
    sizes = [[file.name, check_regular(file).st_size] for file in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def encode_tar(tar: Path, clip: Clip, encoding: Encoding, progress: Progress) -> pa.Table:
    return encode_list(tar_records(tar), clip, encoding, progress)


def tar_records(path: Path) -> list[Record]:
    """The images of a tar file with their captions, then records without an image for damaged entries.

    Raises:
        OSError: the file is missing, or a pipe or device.
        ValmError: a transient error (`is_transient`) while the archive is read.
    """
    check_regular(path)  # opening a pipe would wait
    members: dict[str, tarfile.TarInfo] = {}
    end: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _members(tar):
                    if member.isreg() and not member.issparse():
                        members[member.name] = member
                    elif at_first_dot(member.name)[1] in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES):
                        skipped[member.name] = "a link, a sparse file or a folder is not read"
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
            if is_transient(error):
                raise cannot_read(path, one_line(str(error))) from error
            end[""] = f"the archive ends early: {one_line(str(error))}"
        samples = Samples(members, lambda name: _content(file, members[name]), at_first_dot)
    for name in samples.others:  # unsupported formats, and images such as a mask, 0.mask.png
        suffix, hidden = PurePosixPath(name).suffix.lower(), PurePosixPath(name).name.startswith(".")
        if suffix in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) and not hidden and at_first_dot(name)[0] not in samples.keys:
            unread = unread_formats([suffix])
            skipped[name] = unread[0] if unread else "no image has the same name up to the first dot"
    records = [
        Record(f"{path.name}/{name}", caption, path, members[name].offset_data, members[name].size)
        for name, caption in samples.images.items()
    ]
    uris = (
        (f"{path.name}/{name}".rstrip("/"), reason) for name, reason in {**samples.damaged, **skipped, **end}.items()
    )
    return records + [Record(uri, "", None, reason=reason) for uri, reason in uris]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive. Raises ReadError for an early end or a damaged header, which tarfile accepts."""
    for member in tar:
        if member.size < 0:  # tarfile would read this member again
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
        yield member
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(END_BYTES)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise tarfile.ReadError(f"at byte {tar.offset:,} there is neither a member nor the end of the archive")


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """The content of a caption file. Raises ValueError if it is too large or cut."""
    if member.size > MAX_CAPTION_BYTES:
        raise ValueError(f"a file of more than {MAX_CAPTION_BYTES:,} bytes is not read")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError("the archive ends in it")
    return content
