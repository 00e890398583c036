"""Images in Hugging Face datasets: loaded or streamed, or any iterable of rows like theirs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_COLUMNS, join_captions
from valm.knowledge_base.format import EncodedShard
from valm.knowledge_base.records import Encoding, Record, fingerprint_records
from valm.knowledge_base.sources import SourceShard
from valm.store.shards import Progress
from valm_kernels.json_files import short

if TYPE_CHECKING:
    from valm.clip.clip import Clip


class DatasetSource:
    """The images of `dataset`.

    A resumed build reads the rows of finished shards again to check that they are unchanged, without encoding them.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` (see `open_dataset`), or any iterable of rows that can be
            iterated repeatedly. An image is encoded bytes, a path, a dict of `bytes` and `path` (as `datasets.Image`
            stores it), or a PIL image. None and unreadable images are skipped and listed
            (`ImageKnowledgeBase.skipped`).
        image_column: by default the one that the dataset says to have images, or else "image".
        caption_column: texts or lists of texts; by default the first of CAPTION_COLUMNS that exists, if any.
        shard_size: images per shard; all of a shard are in memory at once, undecoded. A build that was killed encodes
            at most one shard again.

    Raises:
        ValmError: the dataset is an iterator, or lacks rows or these columns; the build raises it if rows have changed
            since it was begun.
    """

    precomputed = False

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        shard_size: int = 4096,
    ):
        if isinstance(dataset, Iterator):
            raise ValmError("the dataset is an iterator, which can be read once only; give what it iterates over")
        of_images = _image_columns(dataset)
        if image_column is None:
            image_column = of_images[0] if len(of_images) == 1 else "image"
        self.dataset = _undecoded(dataset)
        first = next(iter(self.dataset), None)
        if first is None:
            raise ValmError("the dataset has no rows")
        if caption_column is None:
            caption_column = next((name for name in CAPTION_COLUMNS if name in first), None)
        for column in (image_column, caption_column):
            if column is not None and column not in first:
                found = ", ".join(map(str, first))
                raise ValmError(f"the dataset has no column {column!r}, only {found}: name one (--columns)")
        self.image_column, self.caption_column = image_column, caption_column
        self.shard_size = shard_size
        self.rows = len(dataset) if isinstance(dataset, Sized) else None
        self._first = self._record(0, first)

    @property
    def count(self) -> int | None:
        return None if self.rows is None else -(-self.rows // self.shard_size)

    def plan(self) -> dict[str, Any]:
        first_row = fingerprint_records([self._first])
        return {
            "source": "dataset",
            "fingerprint": hashlib.sha256(json.dumps([self.rows, first_row]).encode()).hexdigest(),
            "columns": [self.image_column, self.caption_column],
            "shard_size": self.shard_size,
        }

    def files(self) -> Iterable[Path]:
        return ()  # `shards` compares the content

    def images(self) -> Iterator[Record]:
        return (self._record(number, row) for number, row in enumerate(self.dataset))

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterator[SourceShard]:
        records = self.images()
        number = 0
        while shard := list(islice(records, self.shard_size)):
            if number in done and done[number].get("content") != fingerprint_records(shard):
                begin = number * self.shard_size
                raise ValmError(
                    f"the dataset has changed since the build was begun (rows {begin} to {begin + len(shard) - 1}); "
                    f"choose another folder"
                )
            yield partial(encode_rows, shard)
            number += 1
        if max(done, default=-1) >= number:
            raise ValmError("the dataset has become shorter since the build was begun; choose another folder")

    def _record(self, number: int, row: Mapping[str, Any]) -> Record:
        image = row[self.image_column]
        path = None
        if isinstance(image, Mapping):
            path = image.get("path")
            image = image.get("bytes") or path
        if isinstance(image, str | os.PathLike):
            path = image = Path(image)
        name = PurePath(path).name if path else ""
        return Record(f"{number}/{name}" if name else str(number), self._caption(number, row), image)

    def _caption(self, number: int, row: Mapping[str, Any]) -> str:
        if self.caption_column is None:
            return ""
        value = row[self.caption_column]
        captions = [value] if isinstance(value, str) or value is None else value
        if isinstance(captions, Sequence) and not isinstance(captions, bytes):
            texts = [caption for caption in captions if caption is not None]
            if all(isinstance(text, str) for text in texts):
                return join_captions(texts)
        raise ValmError(
            f"the dataset, row {number}: {self.caption_column!r} is {short(value)}, expected a text or a list of "
            "texts; name another column (--columns)"
        )


def encode_rows(records: list[Record], clip: Clip, encoding: Encoding, progress: Progress) -> EncodedShard:
    """Encodes a shard of rows; its facts hold a hash of them, which `DatasetSource.shards` compares."""
    from valm.knowledge_base.encode import encode_records

    shard = encode_records(records, clip, encoding, progress)
    return dataclasses.replace(shard, facts={"content": fingerprint_records(records)})


def open_dataset(named: str | os.PathLike, *, streaming: bool = False) -> Iterable[Mapping[str, Any]]:
    """A split of a dataset that `save_to_disk` wrote to a folder, or that `datasets.load_dataset` finds.

    Args:
        named: NAME[:CONFIG[:SPLIT]]. The split, by default train, may be a slice, such as in NAME::train[:10%].
        streaming: read it as it is downloaded.

    Raises:
        ValmError: it cannot be read or has no such split.
        ImportError: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face datasets need a further package: pip install -e '.[huggingface]'") from error
    source, config, split = (*os.fspath(named).split(":", 2), "", "")[:3]
    try:
        saved = [name for name in ("state.json", "dataset_dict.json") if (Path(source) / name).is_file()]
        if not saved:
            return datasets.load_dataset(
                source, config or None, split=split or "train", streaming=streaming, trust_remote_code=False
            )
        dataset = datasets.load_from_disk(source)
    except Exception as error:  # datasets raises many types
        first_line = str(error).strip().partition("\n")[0]
        raise ValmError(f"cannot read the dataset {source}: {first_line}") from error
    if config:
        raise ValmError(f"the dataset {source} has no config {config!r}: give a split as {source}::SPLIT")
    if isinstance(dataset, Mapping):
        split = split or "train"
        if split not in dataset:
            raise ValmError(
                f"the dataset {source} has no split {split!r}, only {', '.join(dataset)}: give {source}::SPLIT"
            )
        return dataset[split]
    if split:
        raise ValmError(f"the dataset {source} was saved as one split, got {split!r}: leave it out")
    return dataset


def _image_columns(dataset: Any) -> list[str]:
    """The columns that a dataset itself says to have images."""
    features = getattr(dataset, "features", None) or {}
    return [name for name, feature in features.items() if getattr(feature, "_type", None) == "Image"]


def _undecoded(dataset: Any) -> Iterable[Mapping[str, Any]]:
    """The dataset with its images as stored: workers decode them."""
    for column in _image_columns(dataset):
        dataset = dataset.cast_column(column, type(dataset.features[column])(decode=False))
    return dataset
