"""Retrieval done once for a corpus, so that training reads picture ids instead of running CLIP."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from valm.errors import ValmError
from valm.files import read_json, writable_folder, write_json
from valm.retrieval.knowledge_base import ImageKnowledgeBase
from valm.retrieval.retriever import Retriever
from valm.retrieval.sharded_build import MANIFEST_FILE

FORMAT = "valm corpus retrieval"
VERSION = 1
# What stands in an empty slot.
NO_IMAGE = 2**32 - 1
# Tokens retrieved at once.
BATCH_TOKENS = 16384


class CorpusRetrieval:
    """The tokens of a corpus with the pictures of each, memory-mapped from the folder `retrieve_corpus` wrote.

    Document i is `{"input_ids": (T,) int32, "image_ids": (T, K) uint32}`; image ids count in the knowledge base,
    NO_IMAGE is none.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        tokens, documents, k = manifest["tokens"], manifest["documents"], manifest["k"]
        self.tokens = self._load("tokens.npy", (tokens,), np.int32)
        self.offsets = self._load("document_offsets.npy", (documents + 1,), np.int64)
        self.image_ids = self._load("image_ids.npy", (tokens, k), np.uint32)

    @classmethod
    def open(cls, path: str | os.PathLike) -> CorpusRetrieval:
        """Raises ValmError where the folder is missing, something else, damaged or of another version."""
        path = Path(path)
        if not (path / MANIFEST_FILE).exists():
            raise ValmError(f"no corpus retrieval at {path}: it has no {MANIFEST_FILE}")
        manifest = read_json(path / MANIFEST_FILE, "the manifest")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValmError(f"{path / MANIFEST_FILE} is not the manifest of a corpus retrieval")
        if manifest.get("version") != VERSION:
            raise ValmError(
                f"the corpus retrieval {path} has format version {manifest.get('version')}, this valm reads {VERSION}"
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest["documents"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"documents go from 0 to {len(self) - 1}, got {index}")
        here = slice(self.offsets[index], self.offsets[index + 1])
        return {"input_ids": self.tokens[here], "image_ids": self.image_ids[here]}

    def check_knowledge_base(self, kb: ImageKnowledgeBase) -> None:
        """Raises ValmError where the image ids are not those of `kb`."""
        if self.manifest["knowledge_base"] != kb.fingerprint:
            raise ValmError(f"{self.path} was retrieved from another knowledge base than {kb.path}; do it again")

    def _load(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        try:
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValmError(f"the corpus retrieval {self.path} is damaged: {name}: {error}; do it again") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValmError(
                f"the corpus retrieval {self.path} is damaged: {name} holds {array.dtype} {array.shape}, the manifest "
                f"says {np.dtype(dtype)} {shape}"
            )
        return array


def retrieve_corpus(
    documents: list[list[int]], retriever: Retriever, out: str | os.PathLike, *, progress: bool = True
) -> CorpusRetrieval:
    """Retrieves the pictures of every token of `documents` (token ids) and writes the folder `out`.

    A document's pictures depend on that document only, so the result does not depend on how they are batched here or
    cut into blocks later. Documents of like length are encoded together. Raises ValmError for no documents, an empty
    one, and an `out` that is not new or empty.
    """
    if not documents or not all(documents):
        raise ValmError("the corpus has no documents" if not documents else "the corpus has an empty document")
    if len(retriever.kb) > NO_IMAGE:
        raise ValmError(f"ids of {len(retriever.kb):,} pictures do not fit into 32 bits")
    out = writable_folder(out)
    if any(out.iterdir()):
        raise ValmError(f"the output folder {out} is not empty; choose another")
    offsets = np.cumsum([0, *map(len, documents)])
    # written under another name and moved when whole
    partial = writable_folder(out.with_name(out.name + ".tmp"))
    try:
        np.save(partial / "tokens.npy", np.concatenate(documents).astype(np.int32))
        np.save(partial / "document_offsets.npy", offsets)
        image_ids = np.lib.format.open_memmap(
            partial / "image_ids.npy", "w+", np.uint32, (int(offsets[-1]), retriever.k)
        )
        with tqdm(total=int(offsets[-1]), desc="retrieve", unit=" tokens", disable=not progress) as bar:
            for batch in _batches(documents):
                ids, mask = _padded([documents[index] for index in batch])
                found, _ = retriever.nearest(retriever.encoder(ids, mask))  # (B, T, K)
                found = torch.where(found < 0, NO_IMAGE, found).cpu().numpy()
                for index, row in zip(batch, found, strict=True):
                    image_ids[offsets[index] : offsets[index + 1]] = row[: len(documents[index])]
                bar.update(int(mask.sum()))
        image_ids.flush()
        encoder = retriever.encoder
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "documents": len(documents),
            "tokens": int(offsets[-1]),
            "k": retriever.k,
            "knowledge_base": retriever.kb.fingerprint,
            "query": encoder.query,
            "overlap": encoder.rule.overlap,
            "min_tokens": encoder.rule.min_tokens,
        }
        write_json(partial / MANIFEST_FILE, manifest)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return CorpusRetrieval.open(out)


def _batches(documents: list[list[int]]) -> list[list[int]]:
    """Indices of documents of like length, at most BATCH_TOKENS with their padding (one document alone may be more)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(documents)), key=lambda index: -len(documents[index])):
        if not batches or len(documents[batches[-1][0]]) * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (B, T), filled up on the right."""
    ids = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = 1
    return ids, mask
