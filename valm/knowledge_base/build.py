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

    A killed build resumes after its last complete shard, with the same bytes as in one run. A finished build in `out`
    is compared with the source and opened. Files are compared by name and size; a warning names a file that was written
    after the build began. Damaged images are skipped and listed (`skipped()`).

    Args:
        source: from `valm.knowledge_base.sources`, such as `FolderSource("images")`.
        out: a new or empty folder, or a build of the same source and settings.
        clip: the CLIP that encodes the images.
        encoding: how images are decoded and encoded.
        after: a knowledge base of this CLIP, whose images come first; its files are linked.
        progress: show a progress bar.
        run: where the shards are encoded: here, or on the machines of a `valm.store.ray.RayRun`.

    Returns:
        The knowledge base in `out`, opened.

    Raises:
        OSError: `out` cannot be written.
        ValmError: there is no readable image, `out` holds something else or was made of another source, or `after`
            belongs to another CLIP. Also raised for a transient error (disk, permissions) while an image is read:
            repair it and run the build again.

    Example:
        >>> from valm.knowledge_base.build import build
        >>> from valm.knowledge_base.sources.folder import FolderSource
        >>> kb = build(FolderSource("pictures"), "new-kb", valm.Clip.load("clip"), progress=False)
        >>> len(kb)
        3
    """
    plan = plan_of(source, clip, encoding)
    first = []
    if after is not None:
        after.check_encoder(clip)
        plan = {**after.encoding, **plan, "after": after.fingerprint}  # a plan of embeddings contains no encoding
        first = after.shard_files()
    name, unit = ("copy", " vectors") if source.precomputed else ("encode", " images")
    shards = None if source.count is None else len(first) + source.count
    with sharded_build(out, WHAT, plan, ImageRecord) as build, ProgressBar(name, unit, shards, progress) as bar:
        # a warning, because a copy of the images has new times too
        if build.since is not None and (file := written_since(source.files(), build.since)):
            warnings.warn(
                f"{file} was written since the knowledge base {out} was {'built' if build.finished else 'begun'}. If "
                "the file has changed, delete that folder, which holds the old content, and build it again",
                stacklevel=2,
            )
        build.link(first)
        build.write(partial(_encode, clip=clip, encoding=encoding), source.parts(), run, bar, len(first))
        if not build.finished:
            finish_knowledge_base(build, clip_entry(clip, out), clip.embed_dim)
    return ImageKnowledgeBase.open(out)


def plan_of(source: Source, clip: Clip, encoding: Encoding) -> dict[str, Any]:
    """The settings that a knowledge base depends on, as JSON."""
    return {**source.plan(), "clip": clip.weights_hash, **({} if source.precomputed else encoding.plan())}


def _encode(encode: Encode, progress: Progress, *, clip: Clip, encoding: Encoding) -> tuple[pa.Table, dict[str, int]]:
    table = encode(clip, encoding, progress)
    return table, facts_of(table)
