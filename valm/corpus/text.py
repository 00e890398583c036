"""A corpus of texts: files and folders of them, or a Hugging Face dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from valm.corpus.parts import read_documents, row_documents
from valm.corpus.retrieved import CorpusRetrieval, retrieve_files, retrieve_texts
from valm.errors import ValmError
from valm.retrieval.retriever import Retriever
from valm.store.shards import Runner, run_here

# The fields of a dataset, and their names in `open_dataset`.
DATASET_FIELDS = {"dataset_config": "config", "dataset_split": "split", "streaming": "streaming"}


@dataclass(frozen=True)
class TextCorpus:
    """The texts that `valm retrieve` and `valm train` read; nothing is opened before they are asked for.

    Attributes:
        files: of texts, and folders of them, as for `read_documents`.
        dataset: a Hugging Face dataset, by its name or folder, instead of files.
        dataset_config, dataset_split, streaming: of the dataset; None = as `open_dataset` does by itself.
        column: where the text is in all but text files.

    Raises:
        ValmError: both files and a dataset are given, or fields of a dataset without one.
    """

    files: Sequence[str | os.PathLike] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    streaming: bool | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        if self.dataset is not None and self.files:
            raise ValmError("give either corpus files or --dataset")
        if self.dataset is None:
            for name in DATASET_FIELDS:
                if getattr(self, name) is not None:
                    raise ValmError(f"--{name.replace('_', '-')} is of a Hugging Face dataset: give --dataset too")

    def documents(self) -> Iterator[str]:
        """Every document, in order.

        Raises:
            ValmError: the corpus cannot be read.
            ImportError: a dataset is given, and the package `datasets` is not installed.
        """
        if self.dataset is None:
            return read_documents(self.files, column=self.column)
        from valm.knowledge_base.sources.huggingface import open_dataset  # with the encoding of images

        given = {name: getattr(self, field) for field, name in DATASET_FIELDS.items()}
        options = {name: value for name, value in given.items() if value is not None}
        return row_documents(open_dataset(self.dataset, **options), self.column)

    def retrieve(
        self, retriever: Retriever, out: str | os.PathLike, *, scores: bool = True, run: Runner = run_here
    ) -> CorpusRetrieval:
        """Retrieves the images of every token into `out`. Arguments and errors as in `retrieve_files`, and those of
        `documents`."""
        if self.dataset is None:
            return retrieve_files(self.files, retriever, out, column=self.column, scores=scores, run=run)
        return retrieve_texts(self.documents(), retriever, out, scores=scores, run=run)
