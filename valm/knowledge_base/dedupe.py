"""Images that a knowledge base holds twice: found, and skipped in a copy.

K equal images would take all K places of a token, and crowd out the others.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from valm.knowledge_base.format import WHAT, EncodedShard, finish_knowledge_base, write_shard
from valm.knowledge_base.merge import moved_clip
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.shards.build import ShardedBuild, run_here
from valm.shards.progress import Progress, ProgressBar


def duplicates(kb: ImageKnowledgeBase) -> np.ndarray:
    """Ids (n,) int64, ascending, of the images whose vector is, bit for bit, that of an image before them. Reads all
    vectors."""
    rows = (row.tobytes() for vectors in kb.shards() for row in vectors)
    digests = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    order = np.argsort(np.frombuffer(digests, "S16"), kind="stable")  # ids, equal vectors one after the other
    ordered = np.frombuffer(digests, np.uint64).reshape(-1, 2)[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(1)])


def dedupe(kb: ImageKnowledgeBase, out: str | os.PathLike, *, progress: bool = True) -> ImageKnowledgeBase:
    """Writes to the new folder `out` what `kb` holds without its `duplicates`.

    Of equal images the first stays. Killed and run again, it goes on. Raises ValmError for an `out` that cannot be
    written or holds something else.
    """
    build = ShardedBuild(Path(out), WHAT, {"source": "dedupe", "parts": [kb.fingerprint]})
    if not build.finished:
        dropped = duplicates(kb)
        starts = np.cumsum([0, *(shard["count"] for shard in kb.manifest["shards"])])
        shards = [dropped[(dropped >= start) & (dropped < end)] - start for start, end in pairwise(starts)]
        with ProgressBar("copy", " pictures", len(shards) - len(build.done()), progress) as bar:
            build.write(partial(_copy_without, kb=kb, out=build.out), shards, run_here, bar)
        finish_knowledge_base(build, moved_clip(kb, out), kb.dim)
    return ImageKnowledgeBase.open(out)


def _copy_without(number: int, dropped: np.ndarray, progress: Progress, *, kb: ImageKnowledgeBase, out: Path) -> None:
    """Writes shard `number` of `kb` without its rows `dropped`."""
    shard = kb.encoded_shard(number)
    progress.begin(len(shard.items))
    rows = np.setdiff1d(np.arange(len(shard.items)), dropped)
    thumbnails = None if shard.thumbnails is None else [shard.thumbnails[row] for row in rows]
    write_shard(out, number, EncodedShard(shard.vectors[rows], shard.items.take(rows), thumbnails, shard.skipped))
    progress.advance(len(shard.items))
