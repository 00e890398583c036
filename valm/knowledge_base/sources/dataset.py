"""Images in Hugging Face datasets, loaded or streamed, or in any iterable of similar rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path, PurePath
from typing import Any

from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_COLUMNS, join_captions
from valm.knowledge_base.records import Record
from valm.knowledge_base.sources import record_parts
from valm.store.shards import Part
from valm_kernels.json_files import short


class DatasetSource:
    """The images of `dataset`.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` (see `open_dataset`), or any iterable of rows that can be
            iterated repeatedly. An image is encoded bytes, a path, a dict of `bytes` and `path` (as `datasets.Image`
            stores it), or a PIL image. None and unreadable images are skipped and listed
            (`ImageKnowledgeBase.skipped`).
        image_column: by default the dataset's column of type image, or "image".
        caption_column: texts or lists of texts; by default the first of CAPTION_COLUMNS that exists, if any.
        shard_size: images per shard, which are in memory at once, undecoded. A killed build encodes at most one shard
            again.

    Raises:
        ValmError: the dataset is an iterator, or lacks rows or these columns.
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
            raise ValmError("the dataset is an iterator, which can be read only once: give the object it iterates over")
        features = getattr(dataset, "features", None) or {}
        of_images = [name for name, feature in features.items() if getattr(feature, "_type", None) == "Image"]
        for column in of_images:  # undecoded: workers decode them
            dataset = dataset.cast_column(column, type(features[column])(decode=False))  # type: ignore[attr-defined]
        first = next(iter(dataset), None)
        if first is None:
            raise ValmError("the dataset has no rows")
        if image_column is None:
            image_column = of_images[0] if len(of_images) == 1 else "image"
        if caption_column is None:
            caption_column = next((name for name in CAPTION_COLUMNS if name in first), None)
        for column in filter(None, (image_column, caption_column)):
            if column not in first:
                found = ", ".join(map(str, first))
                raise ValmError(f"the dataset has no column {column!r}, only {found}: name one (--columns)")
        self.dataset, self.image_column, self.caption_column = dataset, image_column, caption_column
        self.shard_size = shard_size
        self.has_paths = isinstance(self._record(0, first).source, Path)

    @property
    def count(self) -> int | None:
        return -(-len(self.dataset) // self.shard_size) if isinstance(self.dataset, Sized) else None

    def plan(self) -> dict[str, Any]:
        columns = [self.image_column, self.caption_column]
        return {"source": "dataset", "columns": columns, "shard_size": self.shard_size}

    def files(self) -> Iterable[Path]:
        # only rows with paths are read for this: parts of rows with bytes have a hash
        records = self.images() if self.has_paths else iter(())
        return (record.source for record in records if isinstance(record.source, Path))

    def images(self) -> Iterator[Record]:
        return (self._record(number, row) for number, row in enumerate(self.dataset))

    def parts(self) -> Iterator[Part]:
        return record_parts(self.images(), self.shard_size)

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
        value = None if self.caption_column is None else row[self.caption_column]
        captions = value if isinstance(value, list) else [value]
        texts = [caption for caption in captions if caption is not None]
        if not all(isinstance(text, str) for text in texts):
            raise ValmError(
                f"the dataset, row {number}: {self.caption_column!r} is {short(value)}, expected a text or a list of "
                "texts: name another column (--columns)"
            )
        return join_captions(texts)


def open_dataset(named: str | os.PathLike, *, streaming: bool = False) -> Iterable[Mapping[str, Any]]:
    """A split of a dataset that `save_to_disk` wrote to a folder, or that `datasets.load_dataset` finds.

    Args:
        named: NAME[:CONFIG[:SPLIT]]. The split, by default train, may be a slice, as in NAME::train[:10%]. A dataset
            from `save_to_disk` takes no config and no slices.
        streaming: read the dataset while it is downloaded.

    Raises:
        ValmError: the dataset cannot be read or has no such config or split.
        ImportError: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face datasets need another package: pip install -e '.[huggingface]'") from error
    source, config, named_split = (*os.fspath(named).split(":", 2), "", "")[:3]
    split = named_split or "train"
    try:
        if not any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(
                source, config or None, split=split, streaming=streaming, trust_remote_code=False
            )
        dataset = datasets.load_from_disk(source)
        if config:
            raise ValueError("it was saved without configs: leave the config out")
        if isinstance(dataset, datasets.DatasetDict):
            return dataset[split]
        if named_split:
            raise ValueError("it was saved as one split: leave the split out")
        return dataset
    except Exception as error:  # datasets raises many types
        first_line = str(error).strip().partition("\n")[0]
        raise ValmError(f"cannot read the dataset {source} ({config or 'default'}:{split}): {first_line}") from error
