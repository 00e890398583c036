"""Builds a knowledge base from a source of images: one shard after the other, here or on a cluster."""

from __future__ import annotations

import os
import warnings
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.format import (
    begin_knowledge_base,
    clip_entry,
    finish_knowledge_base,
    link_shard,
    write_shard,
)
from valm.knowledge_base.records import Encoding, written_since
from valm.knowledge_base.sources import Source, SourceShard
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.progress import progress_bar
from valm.store.shards import Progress, ProgressBar, Runner, run_here


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
    in `out` is just opened; a warning names an image that was written since, and the rows of a dataset are compared.
    Damaged images are skipped and listed (`skipped()`).

    Args:
        source: from `valm.knowledge_base.sources`, such as `FolderSource("images")`.
        encoding: how images are decoded and encoded.
        after: a knowledge base of this CLIP, whose images come first; its files are linked (`link_shard`).
        run: where the shards are encoded: here, or on the machines of a `valm.store.ray.RayRun`.

    Raises:
        OSError: `out` cannot be written.
        ValmError: there is no readable image, `out` holds something else, or the rows of a dataset are not
            those of a finished `out`; `after` is of another CLIP, or is replaced meanwhile. Also for a transient error
            (disk, permissions) while an image is read; repair that and run the build again.
    """
    plan, first = plan_of(source, clip, encoding), list[tuple[Path, Any]]()
    if after is not None:
        after.check_encoder(clip)
        plan = {**after.encoding, **plan, "after": after.fingerprint}  # embeddings have no encoding of their own
        first = [(after.path, shard) for shard in after.manifest["shards"]]
    build = begin_knowledge_base(out, plan)
    # no error: a copy of the images has new times too
    if build.since is not None and (file := written_since(source.files(), build.since)):
        warnings.warn(
            f"{file} has been written since the knowledge base {out} was {'built' if build.finished else 'begun'}. If "
            "its content is another, delete that folder and build it again: it has the old one",
            stacklevel=2,
        )
    finished = build.finished
    with build.writing():
        if not build.finished:
            done = build.done()
            remaining = None if source.count is None else len(first) + source.count - len(done)
            name, unit = ("copy", " vectors") if source.precomputed else ("encode", " images")
            # absolute: another process may have another working directory
            work = partial(_write_shard, out=build.out.absolute(), clip=clip, encoding=encoding)
            with ProgressBar(name, unit, remaining, progress) as bar:
                build.write(work, chain(first, source.shards(_of_source(done, first))), run, bar)
            if after is not None:  # or files would have gone with the checksums of others
                after.check_same()
            finish_knowledge_base(build, clip_entry(clip, out), clip.embed_dim)
    if finished and not list(islice(source.files(), 1)):
        # the rows of a dataset, which has no files
        done = _of_source(build.done(), first)
        parts = progress_bar(source.shards(done), desc="compare", unit=" shards", total=len(done), shown=progress)
        for number, _ in enumerate(parts):
            if number not in done:
                raise ValmError(f"the dataset has become longer since {build.out} was built; choose another folder")
    return ImageKnowledgeBase.open(out)


def _of_source(done: dict[int, Any], first: list[tuple[Path, Any]]) -> dict[int, Any]:
    """The records of finished shards that are the source's, by their numbers in it."""
    return {number - len(first): record for number, record in done.items() if number >= len(first)}


def plan_of(source: Source, clip: Clip, encoding: Encoding) -> dict[str, Any]:
    """All settings that a knowledge base depends on, as JSON."""
    return {**source.plan(), "clip": clip.weights_hash, **({} if source.precomputed else encoding.plan())}


def _write_shard(
    number: int,
    shard: SourceShard | tuple[Path, Any],
    progress: Progress,
    *,
    out: Path,
    clip: Clip,
    encoding: Encoding,
) -> None:
    if isinstance(shard, tuple):
        link_shard(number, shard, progress, out=out)
    else:
        write_shard(out, number, shard(clip, encoding, progress))
