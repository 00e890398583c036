"""Sources of images for a knowledge base, one file for each kind.

A new source is one class that implements `Source`, in one file. `valm.knowledge_base.build.build` accepts it directly;
`FORMATS` of `valm/knowledge_base/images.py` makes it a `--format` of `valm kb build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pyarrow as pa

from valm.knowledge_base.format import image_table
from valm.knowledge_base.records import Encoding, Record, fingerprint_records
from valm.store.shards import Part, Progress

if TYPE_CHECKING:  # a missing source should be found before torch is imported
    from valm.clip.clip import Clip

# The source of a `Part`: calling it reads and encodes the images of one shard. It may be called in another process, so
# it must be picklable: a `functools.partial` of a module's function. For images the function ends in `encode_records`.
Encode: TypeAlias = "Callable[[Clip, Encoding, Progress], pa.Table]"


class Source(Protocol):
    """A source of images, split into shards.

    precomputed: whether the shards already hold CLIP vectors, which `Encoding` does not change.
    count: number of shards, for the progress bar; None if unknown.
    """

    precomputed: bool

    @property
    def count(self) -> int | None: ...

    def plan(self) -> dict[str, Any]:
        """The kind (`source`) and settings of the source, as JSON. A build is resumed only with an equal plan."""

    def files(self) -> Iterable[Path]:
        """The files of the source. A resumed build warns if a file was written since; a hash covers only sizes."""

    def images(self) -> Iterable[Record]:
        """Every image with its caption, in order and undecoded, to train a CLIP. Records without an image are skipped
        entries.

        Raises:
            ValmError: the source has only vectors.
        """

    def parts(self) -> Iterable[Part]:
        """Every shard in order, as an `Encode` and a hash of its content, which a resumed build compares."""


class RecordSource:
    """Images whose records are in memory, `shard_size` in a shard. `kind` is the `source` of its plan."""

    precomputed = False
    kind: str

    def __init__(self, records: list[Record], shard_size: int):
        self.records = records
        self.shard_size = shard_size

    @property
    def count(self) -> int:
        return -(-len(self.records) // self.shard_size)

    def plan(self) -> dict[str, Any]:
        return {"source": self.kind, "shard_size": self.shard_size}

    def files(self) -> Iterable[Path]:
        return (record.source for record in self.records if isinstance(record.source, Path))

    def images(self) -> Iterable[Record]:
        return self.records

    def parts(self) -> Iterable[Part]:
        return record_parts(self.records, self.shard_size)


def record_parts(records: Iterable[Record], shard_size: int) -> Iterator[Part]:
    """Parts of `shard_size` images."""
    records = iter(records)
    while shard := list(islice(records, shard_size)):
        yield Part(fingerprint_records(shard), partial(encode_list, shard))


def encode_list(records: list[Record], clip: Clip, encoding: Encoding, progress: Progress) -> pa.Table:
    from valm.knowledge_base.encode import encode_records  # imports torch, so a wrong path should fail before

    return image_table(*encode_records(records, clip, encoding, progress))
