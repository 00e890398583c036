"""Knowledge bases from Hugging Face datasets: loaded or streamed, or any iterable of rows like theirs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from valm.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.build import build_shards, encode_shard
from valm.knowledge_base.encode import Record
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.shards.build import Run, run_here
from valm.text import one_line

CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "description")


def build_from_dataset(
    dataset: Iterable[Mapping[str, Any]],
    out: str | os.PathLike,
    clip: Clip,
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    batch_size: int = 64,
    shard_size: int = 4096,
    thumbnails: int = 64,
    workers: int | None = None,
    progress: bool = True,
    run: Run = run_here,
) -> ImageKnowledgeBase:
    """Encodes the pictures of `dataset` and writes a knowledge base to `out`.

    dataset: a `datasets.Dataset` or `IterableDataset`, or any iterable of rows that begins anew each time it is
        iterated. A picture is encoded bytes, a path, a dict of `bytes` and `path` (what `datasets.Image` stores), or a
        PIL picture. None, and what cannot be read, is left out and listed (`skipped()`).
    caption_column: a text or a list of texts; by default the first of CAPTION_COLUMNS that there is, if any.
    shard_size: pictures in a shard: what is held in memory, undecoded, and what a killed build has to do again.
    The other arguments, and what a killed build does, as in `build_from_folder`; the rows it had done are read again,
    to see that they are the same, but not encoded.
    Raises ValmError for an iterator, a dataset without rows or without these columns, one whose rows have changed since
    the build was begun, and for an `out` as `build_from_folder` does.
    """
    rows = _Rows(dataset, image_column, caption_column)
    plan = {
        "source": "dataset",
        "fingerprint": rows.fingerprint,
        "clip": clip.weights_hash,
        "columns": [image_column, rows.caption_column],
        "batch_size": batch_size,
        "shard_size": shard_size,
        "thumbnails": thumbnails,
    }

    def shards(done: dict[int, dict[str, Any]]) -> Iterator[list[Record]]:
        records = iter(rows)
        number = 0
        while shard := list(islice(records, shard_size)):
            if number in done and done[number].get("content") != _content(shard):
                raise ValmError(
                    f"the dataset has changed since {out} was begun (rows {number * shard_size} to "
                    f"{number * shard_size + len(shard) - 1}); choose another folder"
                )
            yield shard
            number += 1
        if max(done, default=-1) >= number:
            raise ValmError(f"the dataset has become shorter since {out} was begun; choose another folder")

    work = partial(_encode_shard, clip=clip, batch_size=batch_size, thumbnails=thumbnails, workers=workers)
    count = None if rows.count is None else -(-rows.count // shard_size)
    return build_shards(out, plan, clip, work, shards, count, ("encode", " pictures"), progress, run)


def open_dataset(
    source: str | os.PathLike, *, config: str | None = None, split: str = "train", streaming: bool = False
) -> Iterable[Mapping[str, Any]]:
    """The split of a dataset that `save_to_disk` wrote to the folder `source`, or that `datasets.load_dataset` finds
    under that name or path.

    Raises ValmError where it cannot be read or has no such split, and ImportError without the `datasets` package.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face datasets need a further package: pip install 'valm[huggingface]'") from error
    try:
        saved = [name for name in ("state.json", "dataset_dict.json") if (Path(source) / name).is_file()]
        if not saved:
            return datasets.load_dataset(os.fspath(source), config, split=split, streaming=streaming)
        dataset = datasets.load_from_disk(source)
    except Exception as error:  # datasets raises many kinds
        first_line = str(error).strip().partition("\n")[0]
        raise ValmError(f"cannot read the dataset {source}: {first_line}") from error
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise ValmError(f"the dataset {source} has no split {split!r}, only {', '.join(dataset)}")
        dataset = dataset[split]
    return dataset


class _Rows:
    """The rows of a dataset as records, undecoded."""

    def __init__(self, dataset: Iterable[Mapping[str, Any]], image_column: str, caption_column: str | None):
        if isinstance(dataset, Iterator):
            raise ValmError("the dataset is an iterator, which can be read once only; give what it iterates over")
        first = next(iter(_undecoded(dataset, image_column)), None)
        if first is None:
            raise ValmError("the dataset has no rows")
        if caption_column is None:
            caption_column = next((name for name in CAPTION_COLUMNS if name in first), None)
        for column in (image_column, caption_column):
            if column is not None and column not in first:
                raise ValmError(f"the dataset has no column {column!r}, only {', '.join(map(str, first))}")
        self.dataset = _undecoded(dataset, image_column)
        self.image_column, self.caption_column = image_column, caption_column
        self.count = len(dataset) if hasattr(dataset, "__len__") else None
        first_record = _content([self._record(0, first)])
        self.fingerprint = hashlib.sha256(json.dumps([self.count, first_record]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Record]:
        return (self._record(number, row) for number, row in enumerate(self.dataset))

    def _record(self, number: int, row: Mapping[str, Any]) -> Record:
        picture = row[self.image_column]
        path = None
        if isinstance(picture, Mapping):
            path = picture.get("path")
            picture = picture.get("bytes") or path
        if isinstance(picture, str | os.PathLike):
            path = picture = Path(picture)
        name = PurePath(path).name if path else ""
        captions = row[self.caption_column] if self.caption_column is not None else None
        captions = [captions] if isinstance(captions, str) else captions or []
        lines = [line for line in map(one_line, map(str, captions)) if line]
        return Record(f"{number}/{name}" if name else str(number), "\n".join(lines), picture)


def _undecoded(dataset: Iterable[Mapping[str, Any]], image_column: str) -> Iterable[Mapping[str, Any]]:
    """The dataset with its pictures as they are stored: they are decoded in the workers, each by itself."""
    features = getattr(dataset, "features", None)
    if features is None or image_column not in features or not hasattr(features[image_column], "decode"):
        return dataset
    return dataset.cast_column(image_column, type(features[image_column])(decode=False))


def _content(records: list[Record]) -> str:
    """SHA-256 over the names, captions and sizes of the pictures."""
    digest = hashlib.sha256()
    for record in records:
        source = record.source
        if isinstance(source, Path):
            size = source.stat().st_size if source.is_file() else None
        else:
            size = source.size if isinstance(source, Image.Image) else source and len(source)
        digest.update(json.dumps([record.uri, record.caption, size]).encode())
    return digest.hexdigest()


def _encode_shard(number: int, records: list[Record], progress: Any, **arguments: Any) -> None:
    encode_shard(number, records, progress, content=_content(records), **arguments)
