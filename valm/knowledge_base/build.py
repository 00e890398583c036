"""Builds a knowledge base from a source of images: one shard after the other, here or on a cluster."""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import Any

import pyarrow as pa

from valm.clip.clip import Clip
from valm.knowledge_base.format import WHAT, ImageRecord, clip_entry, facts_of, finish_knowledge_base
from valm.knowledge_base.records import Encoding, written_since
from valm.knowledge_base.sources import Encode, Source
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.shards import Progress, ProgressBar, Runner, run_here, sharded_build


def build(
    source: Source,
    out: str | os.PathLike,
    clip: Clip,
    encoding: Encoding = Encoding(),
    *,
    after: ImageKnowledgeBase | None = None,
    progress: bool = True,
    run: Runner = run_here,
) -> ImageKnowledgeBase:
    """Encodes the images of `source` and writes a knowledge base to the folder `out`.

    A build that was killed resumes after its last complete shard, with the same bytes as in one run. A finished build
    in `out` is compared with the source and opened. A warning names a file that was written since the build began:
    files are compared by name and size. Damaged images are skipped and listed (`skipped()`).

    Args:
        source: from `valm.knowledge_base.sources`, such as `FolderSource("images")`.
        encoding: how images are decoded and encoded.
        after: a knowledge base of this CLIP, whose images come first; its files are linked.
        run: where the shards are encoded: here, or on the machines of a `valm.store.ray.RayRun`.

    Raises:
        OSError: `out` cannot be written.
        ValmError: there is no readable image, `out` holds something else or was made of another source; `after` is of
            another CLIP. Also for a transient error (disk, permissions) while an image is read; repair that and run
            the build again.
    """
    plan = plan_of(source, clip, encoding)
    first = []
    if after is not None:
        after.check_encoder(clip)
        plan = {**after.encoding, **plan, "after": after.fingerprint}  # embeddings have no encoding of their own
        first = after.shard_files()
    name, unit = ("copy", " vectors") if source.precomputed else ("encode", " images")
    shards = None if source.count is None else len(first) + source.count
    with sharded_build(out, WHAT, plan, ImageRecord) as build, ProgressBar(name, unit, shards, progress) as bar:
        # no error: a copy of the images has new times too
        if build.since is not None and (file := written_since(source.files(), build.since)):
            warnings.warn(
                f"{file} was written since the knowledge base {out} was {'built' if build.finished else 'begun'}. If "
                "its content has changed, delete that folder and build it again: it has the old content",
                stacklevel=2,
            )
        build.link(first)
        build.write(partial(_encode, clip=clip, encoding=encoding), source.parts(), run, bar, len(first))
        if not build.finished:
            finish_knowledge_base(build, clip_entry(clip, out), clip.embed_dim)
    return ImageKnowledgeBase.open(out)


def plan_of(source: Source, clip: Clip, encoding: Encoding) -> dict[str, Any]:
    """All settings that a knowledge base depends on, as JSON."""
    return {**source.plan(), "clip": clip.weights_hash, **({} if source.precomputed else encoding.plan())}


def _encode(encode: Encode, progress: Progress, *, clip: Clip, encoding: Encoding) -> tuple[pa.Table, dict[str, int]]:
    table = encode(clip, encoding, progress)
    return table, facts_of(table)
