"""Where the images of a knowledge base come from: one file for each kind of source.

A new source is one class that fits `Source`, in one file. `valm.knowledge_base.build.build` takes it as it is; one line
in `FORMATS` of `valm/cli/kb.py` makes it a `--format` of `valm kb build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from valm.clip import Clip
from valm.knowledge_base.encode import Encoding, Record
from valm.knowledge_base.format import EncodedShard
from valm.shards.progress import Progress

# The part of a source that becomes one shard. Calling it reads and encodes that part, perhaps in another process, so it
# is picklable: a `functools.partial` of a function in a module. For images that function ends in `encode_records`.
SourceShard = Callable[[Clip, Encoding, Progress], EncodedShard]


class Source(Protocol):
    """A source of images, parted into shards.

    precomputed: whether its shards hold CLIP vectors already, so that `Encoding` does not change them.
    """

    precomputed: bool

    @property
    def count(self) -> int | None:
        """How many shards there are, for the progress bar; None where this is not known beforehand."""

    def plan(self) -> dict[str, Any]:
        """What the result depends on, as JSON: `source`, the kind of source; `fingerprint`, a hash of what is in it;
        and each of its settings. A build is resumed only with an equal plan."""

    def images(self) -> Iterable[Record]:
        """Every image with its caption, in order and undecoded: what a CLIP is trained on. Records without an image
        are those that are skipped. Raises ValmError where there are none, only vectors."""

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        """Every shard in order, those that are done included.

        done: the record of each shard that a build interrupted earlier has finished, by its number. It holds the
            `facts` of the `EncodedShard`; a source that may change meanwhile compares them, and raises ValmError.
        """
