"""Merges knowledge bases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from valm.errors import ValmError
from valm.knowledge_base.format import begin_knowledge_base, finish_knowledge_base, write_shard
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.files import relative_path
from valm.store.shards import Progress, ProgressBar, run_here


def merge(parts: Sequence[str | os.PathLike], out: str | os.PathLike, *, progress: bool = True) -> ImageKnowledgeBase:
    """Merges the knowledge bases in the folders `parts`, all of one CLIP, into a new one in `out`.

    Images are numbered in the order of `parts`. A merge that was killed resumes.

    Raises:
        OSError: `out` cannot be written.
        ValmError: there are no parts, they are of different CLIPs, or `out` holds something else.
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
    build = begin_knowledge_base(out, {"source": "merge", "parts": [kb.fingerprint for kb in opened]})
    with build.writing():
        if not build.finished:
            shards = [(kb, number) for kb in opened for number in range(len(kb.manifest["shards"]))]
            with ProgressBar("merge", " images", len(shards) - len(build.done()), progress) as bar:
                build.write(partial(_copy_shard, out=build.out), shards, run_here, bar)
            finish_knowledge_base(build, moved_clip(opened, out), opened[0].dim)
    return ImageKnowledgeBase.open(out)


def moved_clip(kbs: Sequence[ImageKnowledgeBase], out: str | os.PathLike) -> dict[str, Any]:
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


def _copy_shard(number: int, shard: tuple[ImageKnowledgeBase, int], progress: Progress, *, out: Path) -> None:
    kb, shard_number = shard
    encoded = kb.encoded_shard(shard_number)
    progress.begin(len(encoded.items))
    write_shard(out, number, encoded)
    progress.advance(len(encoded.items))
