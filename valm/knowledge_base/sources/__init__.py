"""Sources of images for a knowledge base, one file for each kind.

A new source is one class that implements `Source`, in one file. `valm.knowledge_base.build.build` accepts it directly;
`FORMATS` of `valm/knowledge_base/images.py` makes it a `--format` of `valm kb build`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from valm.knowledge_base.format import EncodedShard
from valm.knowledge_base.records import Encoding, Record
from valm.store.shards import Progress

if TYPE_CHECKING:  # a source that is not there is found before torch is imported
    from valm.clip.clip import Clip

# The part of a source that becomes one shard. Calling it reads and encodes that part, possibly in another process, so
# it must be picklable: a `functools.partial` of a module's function. For images that function ends in `encode_records`.
SourceShard: TypeAlias = "Callable[[Clip, Encoding, Progress], EncodedShard]"


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
