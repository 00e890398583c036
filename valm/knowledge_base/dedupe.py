"""Finds duplicate images of a knowledge base, and copies it without them.

K equal images would be all K images of a token, and crowd out the others.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from valm.knowledge_base.format import EncodedShard, begin_knowledge_base, finish_knowledge_base, write_shard
from valm.knowledge_base.merge import moved_clip
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.shards import Progress, ProgressBar, run_here


def duplicates(kb: ImageKnowledgeBase) -> np.ndarray:
    """Ids (n,) int64, ascending, of the images whose vector equals an earlier one bit for bit. Reads all vectors."""
    rows = (row.tobytes() for vectors in kb.shards() for row in vectors)
    digests = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    order = np.argsort(np.frombuffer(digests, "S16"), kind="stable")  # ids, those of equal vectors adjacent
    ordered = np.frombuffer(digests, np.uint64).reshape(-1, 2)[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(1)])


def dedupe(kb: ImageKnowledgeBase, out: str | os.PathLike, *, progress: bool = True) -> ImageKnowledgeBase:
    """Copies `kb` without its `duplicates` to the new folder `out`; of equal images the first is copied.

    A run that was killed resumes.

    Raises:
        OSError: `out` cannot be written.
        ValmError: `out` holds something else.
    """
    build = begin_knowledge_base(out, {"source": "dedupe", "parts": [kb.fingerprint]})
    with build.writing():
        if not build.finished:
            dropped = duplicates(kb)
            starts = np.cumsum([0, *(shard["count"] for shard in kb.manifest["shards"])])
            shards = [dropped[(dropped >= start) & (dropped < end)] - start for start, end in pairwise(starts)]
            with ProgressBar("copy", " images", len(shards) - len(build.done()), progress) as bar:
                build.write(partial(_copy_without, kb=kb, out=build.out), shards, run_here, bar)
            finish_knowledge_base(build, moved_clip([kb], out), kb.dim)
    return ImageKnowledgeBase.open(out)


def _copy_without(number: int, dropped: np.ndarray, progress: Progress, *, kb: ImageKnowledgeBase, out: Path) -> None:
    """Writes shard `number` of `kb` without its rows `dropped`."""
    shard = kb.encoded_shard(number)
    progress.begin(len(shard.items))
    rows = np.setdiff1d(np.arange(len(shard.items)), dropped)
    thumbnails = None if shard.thumbnails is None else [shard.thumbnails[row] for row in rows]
    write_shard(out, number, EncodedShard(shard.vectors[rows], shard.items.take(rows), thumbnails, shard.skipped))
    progress.advance(len(shard.items))
