"""Knowledge bases made of others: several joined into one, and one without the images that it holds twice.

K equal images would be all K images of a token, and crowd out the others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from valm.errors import ValmError
from valm.knowledge_base.format import (
    EncodedShard,
    begin_knowledge_base,
    finish_knowledge_base,
    link_shard,
    write_shard,
)
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.files import relative_path
from valm.store.shards import Progress, ProgressBar, check_content, run_here


def merge(parts: Sequence[str | os.PathLike], out: str | os.PathLike, *, progress: bool = True) -> ImageKnowledgeBase:
    """Merges the knowledge bases in the folders `parts`, all of one CLIP, into a new one in `out`.

    Images are numbered in the order of `parts`. The files are those of the parts, under further names (hard links),
    with the checksums that the parts' manifests have; where the file system makes no links, they are copied. A merge
    that was killed resumes.

    Raises:
        OSError: `out` cannot be written.
        ValmError: there are no parts, they are of different CLIPs, one is replaced meanwhile, a file that is copied is
            damaged, or `out` holds something else.
    """
    opened = [ImageKnowledgeBase.open(part) for part in parts]
    if not opened:
        raise ValmError("nothing to merge: name at least one knowledge base")
    first = opened[0].manifest["clip"]
    for kb in opened[1:]:
        other = kb.manifest["clip"]
        if other["weights_hash"] != first["weights_hash"]:
            raise ValmError(
                f"{opened[0].path} was built with the CLIP {first['name']} (weights {first['weights_hash'][:12]}) but "
                f"{kb.path} with {other['name']} ({other['weights_hash'][:12]}); merge only those of one CLIP"
            )
    parts_of = {"source": "merge", "parts": [kb.fingerprint for kb in opened]}
    encoding = next((kb.encoding for kb in opened if kb.encoding), {})  # that of embeddings is not known
    build = begin_knowledge_base(out, {**parts_of, **encoding})
    with build.writing():
        if not build.finished:
            shards = [(kb.path, shard) for kb in opened for shard in kb.manifest["shards"]]
            with ProgressBar("merge", " images", len(shards) - len(build.done()), progress) as bar:
                build.write(partial(link_shard, out=build.out), shards, run_here, bar)
            for kb in opened:  # or files would have gone with the checksums of others
                kb.check_same()
            finish_knowledge_base(build, _moved_clip(opened, out), opened[0].dim)
    return ImageKnowledgeBase.open(out)


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
        ValmError: a file of `kb` is damaged, or `out` holds something else.
        OSError: `out` cannot be written.
    """
    build = begin_knowledge_base(out, {"source": "dedupe", "parts": [kb.fingerprint], **kb.encoding})
    with build.writing():
        if not build.finished:
            dropped = duplicates(kb)
            starts = np.cumsum([0, *(shard["count"] for shard in kb.manifest["shards"])])
            shards = [dropped[(dropped >= start) & (dropped < end)] - start for start, end in pairwise(starts)]
            with ProgressBar("copy", " images", len(shards) - len(build.done()), progress) as bar:
                build.write(partial(_copy_without, kb=kb, out=build.out), shards, run_here, bar)
            finish_knowledge_base(build, _moved_clip([kb], out), kb.dim)
    return ImageKnowledgeBase.open(out)


def _copy_without(number: int, dropped: np.ndarray, progress: Progress, *, kb: ImageKnowledgeBase, out: Path) -> None:
    """Writes shard `number` of `kb` without its rows `dropped`."""
    for entry in kb.manifest["shards"][number]["files"]:  # or damaged content would get a good checksum
        check_content(kb.path / entry["name"], entry)
    shard = kb.encoded_shard(number)
    progress.begin(len(shard.items))
    rows = np.setdiff1d(np.arange(len(shard.items)), dropped)
    thumbnails = None if shard.thumbnails is None else [shard.thumbnails[row] for row in rows]
    write_shard(out, number, EncodedShard(shard.vectors[rows], shard.items.take(rows), thumbnails, shard.skipped))
    progress.advance(len(shard.items))


def _moved_clip(kbs: Sequence[ImageKnowledgeBase], out: str | os.PathLike) -> dict[str, Any]:
    """The CLIP entry of `kbs`, all of one CLIP, for the manifest of a knowledge base in `out`, to which a folder
    becomes relative: that of the first that says where the CLIP is.
    """
    entries = []
    for kb in kbs:
        clip = kb.manifest["clip"]
        source = clip["source"]
        if source is not None and (kb.path / source).is_dir():
            source = relative_path(kb.path / source, out)
        elif clip["weight_files"]:
            source = None
        entries.append({**clip, "source": source})
    return next((entry for entry in entries if entry["source"] is not None), entries[0])
