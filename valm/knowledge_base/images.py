"""Images with their captions as commands name them, by format and name: a source of `valm.knowledge_base.sources`."""

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
# The formats to which a field belongs.
FORMATS_OF = {"captions": ("pictures",), "columns": ("dataset", "csv"), "streaming": ("dataset",)}


@dataclass(frozen=True)
class ImageSource:
    """The images that `valm kb build`, `kb add` and `clip train` read. `open` opens the source.

    Attributes:
        source: a folder or zip file of images, a tar file or a folder of tar files, a table, or a dataset as for
            `open_dataset`.

    Raises:
        ValmError: there is no such format, or a field belongs to another format.

    Example:
        >>> from valm.knowledge_base.images import ImageSource
        >>> source = ImageSource("pictures").open()
        >>> [image.caption for image in source.images()]
        ['the blue sky', 'the green grass', 'a red apple']
    """

    source: str | os.PathLike
    format: str = option(
        "pictures: a folder or zip file of images, with captions next to them or in a table of captions. webdataset: "
        "tar files as img2dataset writes them. dataset: a Hugging Face dataset, NAME[:CONFIG[:SPLIT]]. embeddings: "
        "vectors made by --clip, in clip-retrieval's layout. csv: a table (CSV or TSV) of image paths, relative to the "
        "table, and captions",
        "pictures",
        choices=FORMATS,
    )
    captions: str | os.PathLike | None = option("table of captions, if it is not in the folder of the images")
    columns: str | None = option(
        "columns of a dataset or table, if their names are unusual; either may be empty",
        metavar="IMAGE,CAPTION",
    )
    streaming: bool = option("read a dataset while it is downloaded", False)

    def __post_init__(self) -> None:
        check_fields(self)
        for name, formats in FORMATS_OF.items():
            if getattr(self, name) and self.format not in formats:
                raise ValmError(f"--{name} is for --format {' or '.join(formats)}, not for {self.format}")

    def open(self) -> Source:
        """The source, opened: an object of a class in `valm.knowledge_base.sources`.

        Raises:
            OSError, ValmError: the source cannot be read (see its class).
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
        if source.suffix.lower() == ".zip" and not source.is_dir():
            from valm.knowledge_base.sources.zip_file import ZipSource

            return ZipSource(source, captions=self.captions)
        return FolderSource(source, captions=self.captions)
