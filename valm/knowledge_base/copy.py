"""Knowledge bases made of others: several joined into one, and one without its duplicate images.

K equal images would be all K images of a token, and crowd out other images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from valm.errors import ValmError
from valm.knowledge_base.format import WHAT, ImageRecord, facts_of, finish_knowledge_base
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.files import relative_path
from valm.store.shards import Part, Progress, ProgressBar, run_here, sharded_build
from valm_kernels.checksums import file_sha256


def merge(parts: Sequence[str | os.PathLike], out: str | os.PathLike) -> ImageKnowledgeBase:
    """Merges the knowledge bases in the folders `parts`, all of one CLIP, into a new one in `out`.

    Images are numbered in the order of `parts`. The files are hard links to the parts' files, with the checksums in
    the parts' manifests. If the file system has no links, files are copied. A killed merge resumes.

    Raises:
        OSError: `out` cannot be written.
        ValmError: there are no parts, the parts belong to different CLIPs, or `out` holds something else.
    """
    opened = [ImageKnowledgeBase.open(part) for part in parts]
    if not opened:
        raise ValmError("nothing to merge: name at least one knowledge base")
    first = opened[0].manifest["clip"]
    for kb in opened[1:]:
        other = kb.manifest["clip"]
        if other["weights_hash"] != first["weights_hash"]:
            raise ValmError(
                f"{opened[0].path} was built with the CLIP {first['name']} (weights {first['weights_hash'][:12]}), but "
                f"{kb.path} with {other['name']} ({other['weights_hash'][:12]}): merge knowledge bases of one CLIP"
            )
    encoding = next((kb.encoding for kb in opened if kb.encoding), {})  # the encoding of embeddings is not known
    plan = {"source": "merge", "parts": [kb.fingerprint for kb in opened], **encoding}
    with sharded_build(out, WHAT, plan, ImageRecord) as build:
        build.link(shard for kb in opened for shard in kb.shard_files())
        if not build.finished:
            finish_knowledge_base(build, _moved_clip(opened, out), opened[0].dim)
    return ImageKnowledgeBase.open(out)


def duplicates(kb: ImageKnowledgeBase) -> np.ndarray:
    """Ids (n,) int64, ascending, of the images whose vector equals an earlier one bit for bit. Reads all vectors."""
    rows = (row.tobytes() for vectors in kb.shards() for row in vectors)
    digests = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    order = np.argsort(np.frombuffer(digests, "S16"), kind="stable")  # ids; ids of equal vectors are adjacent
    ordered = np.frombuffer(digests, np.uint64).reshape(-1, 2)[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(1)])


def dedupe(kb: ImageKnowledgeBase, out: str | os.PathLike, *, progress: bool = True) -> ImageKnowledgeBase:
    """Copies `kb` without its `duplicates` to the new folder `out`. The first of several equal images is copied.

    A killed run resumes.

    Raises:
        ValmError: a file of `kb` is damaged, or `out` holds something else.
        OSError: `out` cannot be written.
    """
    plan = {"source": "dedupe", "parts": [kb.fingerprint], **kb.encoding}
    shards = kb.manifest["shards"]
    with (
        sharded_build(out, WHAT, plan, ImageRecord) as build,
        ProgressBar("copy", " images", len(shards), progress) as bar,
    ):
        dropped = np.empty(0, np.int64) if build.finished else duplicates(kb)
        parts = (Part(shard["sha256"], number) for number, shard in enumerate(shards))
        build.write(partial(_without, kb=kb, dropped=dropped), parts, run_here, bar)
        if not build.finished:
            finish_knowledge_base(build, _moved_clip([kb], out), kb.dim)
    return ImageKnowledgeBase.open(out)


def _without(
    number: int, progress: Progress, *, kb: ImageKnowledgeBase, dropped: np.ndarray
) -> tuple[pa.Table, dict[str, int]]:
    """Shard `number` of `kb` without the images `dropped`."""
    file, record = kb.shard_files()[number]
    if file_sha256(file) != record["sha256"]:  # otherwise damaged content would get a good checksum
        raise ValmError(f"{file} is damaged: it does not match its checksum; make it again")
    table = kb.table(number)
    progress.begin(len(table))
    start = sum(shard["count"] for shard in kb.manifest["shards"][:number])
    kept = table.take(np.setdiff1d(np.arange(len(table)), dropped - start))
    progress.advance(len(table))
    return kept, facts_of(kept)


def _moved_clip(kbs: Sequence[ImageKnowledgeBase], out: str | os.PathLike) -> dict[str, Any]:
    """The CLIP entry of `kbs`, all of one CLIP, for a manifest in `out`: with the first CLIP folder that exists,
    relative to `out`."""
    clip: dict[str, Any] = kbs[0].manifest["clip"]
    folders = (kb.path / (kb.manifest["clip"]["source"] or "none") for kb in kbs)
    found = next(filter(Path.is_dir, folders), None)
    return clip if found is None else {**clip, "source": relative_path(found, out)}
