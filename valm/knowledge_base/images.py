"""Images with their captions, as commands name them: a source of `valm.knowledge_base.sources` by format and name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.errors import ValmError
from valm.options import check_fields, option

if TYPE_CHECKING:
    from valm.knowledge_base.sources import Source

FORMATS = ("pictures", "webdataset", "dataset", "embeddings", "csv")
# The fields that are of some formats only.
FORMATS_OF = {"captions": ("pictures",), "columns": ("dataset", "csv"), "streaming": ("dataset",)}


@dataclass(frozen=True)
class ImageSource:
    """The images that `valm kb build`, `kb add` and `clip train` read; nothing is opened before `open`.

    Attributes:
        source: folder of the images, tar file or folder of them, table, or dataset as `open_dataset` takes it.

    Raises:
        ValmError: there is no such format, or a field belongs to another one.
    """

    source: str | os.PathLike
    format: str = option(
        "images with captions beside them or in a captions table; tar files as img2dataset writes them; a Hugging Face "
        "dataset, NAME[:CONFIG[:SPLIT]]; embeddings that --clip has made, in clip-retrieval's layout; a table (CSV or "
        "TSV) of image paths, relative to it, and captions",
        "pictures",
        choices=FORMATS,
    )
    captions: str | os.PathLike | None = option("table of captions, where it is not beside the images")
    columns: str | None = option(
        "of a dataset or table, where they have other than the usual names; either may be empty",
        metavar="IMAGE,CAPTION",
    )
    streaming: bool = option("read a dataset as it is downloaded", False)

    def __post_init__(self) -> None:
        check_fields(self)
        for name, formats in FORMATS_OF.items():
            if getattr(self, name) and self.format not in formats:
                raise ValmError(f"--{name} is for --format {' or '.join(formats)}, not for {self.format}")

    def open(self) -> Source:
        """The source.

        Raises:
            OSError, ValmError: as the class of the source.
            ImportError: a dataset is given, and the package `datasets` is not installed.
        """
        image, _, caption = (self.columns or "").partition(",")
        columns: Any = {"image_column": image.strip() or None, "caption_column": caption.strip() or None}
        source = Path(self.source)
        if self.format == "webdataset":
            from valm.knowledge_base.sources.webdataset import WebdatasetSource

            return WebdatasetSource(source)
        if self.format == "dataset":
            from valm.knowledge_base.sources.dataset import DatasetSource, open_dataset

            return DatasetSource(open_dataset(self.source, streaming=self.streaming), **columns)
        if self.format == "embeddings":
            from valm.knowledge_base.sources.embeddings import EmbeddingSource

            return EmbeddingSource(source)
        from valm.knowledge_base.sources.folder import FolderSource, TableSource

        if self.format == "csv":
            return TableSource(source, **columns)
        return FolderSource(source, captions=self.captions)
