"""Sources of images for a knowledge base, one file for each kind.

A new source is one class that implements `Source`, in one file. `valm.knowledge_base.build.build` accepts it directly;
a line in `FORMATS` of `valm/cli/kb.py` makes it a `--format` of `valm kb build`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from valm.clip.clip import Clip
from valm.knowledge_base.encode import Encoding, Record
from valm.knowledge_base.format import EncodedShard
from valm.store.files import cannot_read, is_transient
from valm.store.shards import Progress

# The part of a source that becomes one shard. Calling it reads and encodes that part, possibly in another process, so
# it must be picklable: a `functools.partial` of a module's function. For images that function ends in `encode_records`.
SourceShard = Callable[[Clip, Encoding, Progress], EncodedShard]


class Source(Protocol):
    """A source of images, split into shards.

    precomputed: whether its shards already hold CLIP vectors, which `Encoding` does not change.
    """

    precomputed: bool

    @property
    def count(self) -> int | None:
        """Number of shards, for the progress bar; None if unknown."""

    def plan(self) -> dict[str, Any]:
        """What the result depends on, as JSON: `source`, the kind of source; `fingerprint`, a hash of its content; and
        its settings. A build is resumed only with an equal plan."""

    def files(self) -> Iterable[Path]:
        """The files that it reads. A build that is resumed warns if one was written since it began: the fingerprint has
        their sizes alone."""

    def images(self) -> Iterable[Record]:
        """Every image with its caption, in order and undecoded, to train a CLIP on. Records without an image are
        skipped entries.

        Raises:
            ValmError: the source has only vectors.
        """

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        """Every shard in order, finished ones too.

        Args:
            done: the manifest's entry of each shard that an interrupted build has finished, by number. It holds the
                `facts` of the `EncodedShard`, by which the source can check that it has not changed.

        Raises:
            ValmError: the source has changed.
        """


def fingerprint_files(files: Iterable[Path]) -> str:
    """SHA-256 over the names and sizes of `files`.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.stat().st_size]).encode())
    return digest.hexdigest()


def fingerprint_records(records: Iterable[Record]) -> str:
    """SHA-256 over the names, captions and sizes of the images in `records`.

    Raises:
        ValmError: a transient error (`is_transient`) while a file is looked up.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.uri, record.caption, _size(record.source)]).encode())
    return digest.hexdigest()


def written_since(files: Iterable[Path], since: float) -> Path | None:
    """The first of `files` that was written after `since`, in seconds since 1970, if there is one."""
    now = time.time()
    for file in files:
        try:
            written = file.stat().st_mtime
        except OSError:  # a damaged record, as for `_size`
            continue
        if since < written <= now:  # a time in the future, as of an archive, says nothing
            return file
    return None


def _size(source: Path | bytes | Image.Image | None) -> int | tuple[int, int] | None:
    """Bytes of a file (None if it does not exist) or of its content; width and height of a PIL image."""
    if source is None:
        return None
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Image.Image):
        return source.size
    try:
        return source.stat().st_size if source.is_file() else None
    except OSError as error:  # an impossible path, such as one that is too long, is a damaged record
        if is_transient(error):
            raise cannot_read(source, error.strerror) from error
        return None
