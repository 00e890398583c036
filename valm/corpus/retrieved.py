"""Retrieval done once for a corpus, so that training reads image ids instead of running CLIP.

    manifest.json          format, version, documents, tokens, plan, shards
    shard-00000.arrow      a row a document (`corpus_schema`): its tokens, the images of each token (2**32 - 1 = none),
                           their scores if wanted (-inf = none), and its group: equal for texts of one image, 0 for a
                           text without an image
    tokenizer.json, ...    the tokenizer of the corpus, in Hugging Face's format
    _clip.json             the place of the CLIP, if the user named it

A document's images depend only on that document (and, up to rounding, on its shard). So training can cut documents to
any length without retrieving again.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerFast
from typing_extensions import TypedDict

from valm.clip.tokenizer import batches_by_length, beginning_with_bos, open_tokenizer, padded, tokenize_documents
from valm.corpus.texts import MAX_DOCUMENT, TOO_LONG, Caption, FileDocuments, fingerprint
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import QUERY_SETTINGS
from valm.retrieval.faiss_index import FaissIndex
from valm.retrieval.ray_index import ShardedIndex
from valm.retrieval.retriever import Retriever
from valm.store.files import Count, read_json, write_json
from valm.store.shards import (
    Manifest,
    Part,
    Progress,
    ProgressBar,
    Runner,
    ShardRecord,
    column_of,
    damaged_files,
    open_manifest,
    read_shard,
    run_here,
    shard_file,
    sharded_build,
    totals,
)
from valm.text import utf8
from valm_kernels import FlatIPIndex
from valm_kernels.json_files import check_own

WHAT = "corpus retrieval"
VERSION = 4
CLIP_FILE = "_clip.json"
# Bytes of a shard's text or 32-bit token ids: about a million tokens. A killed retrieval repeats at most one shard.
PART_BYTES = 4 << 20
# Stands for -1 in a file, whose image ids are unsigned.
NO_IMAGE = 2**32 - 1
# Tokens retrieved at once.
BATCH_TOKENS = 16384
# Shards mapped at once.
OPEN_SHARDS = 1 << 13
# The record of a shard counts these, and the manifest contains their sums.
FACTS = ("documents", "tokens")


class CorpusRecord(ShardRecord):
    """The record of a shard."""

    documents: Count
    tokens: Count


class CorpusPlan(TypedDict):
    """The keys of the plan that this module reads; `retrieve_corpus` writes more."""

    precision: str
    tokenizer: str
    knowledge_base: str
    k: Annotated[int, Field(ge=1, le=1 << 16)]
    query: Literal["eot", "state"]
    overlap: Count
    min_tokens: Count
    eos: Count
    scores: bool


class CorpusManifest(Manifest):
    """The content of manifest.json."""

    documents: Annotated[int, Field(ge=1)]
    tokens: Count
    plan: CorpusPlan  # type: ignore[misc]  # narrower than the inherited type
    shards: list[CorpusRecord]  # type: ignore[misc]


def corpus_schema(k: int, scores: bool) -> pa.Schema:
    """The columns of a shard with `k` images per token."""
    columns = [("input_ids", pa.list_(pa.int32())), ("group", pa.int64())]
    columns.append(("image_ids", pa.list_(pa.list_(pa.uint32(), k))))
    return pa.schema(columns + [("image_scores", pa.list_(pa.list_(pa.float32(), k)))] * scores)


class _Shard(NamedTuple):
    offsets: np.ndarray  # (documents + 1,) int32: where each document begins in the other arrays
    groups: np.ndarray  # (documents,) int64
    tokens: np.ndarray  # (n,) int32
    image_ids: np.ndarray  # (n, K) uint32
    image_scores: np.ndarray | None  # (n, K) float32


class CorpusRetrieval(Sequence[dict[str, np.ndarray]]):
    """The tokens of a corpus with the images of each token, memory-mapped from the folder that retrieval wrote.

    Document i is `{"input_ids": (T,) int32, "image_ids": (T, K) int64}`, found in O(log shards). Image ids are ids in
    the knowledge base, -1 = none. If `has_scores`, there is also `image_scores` (T, K) float32, -inf = none.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path.absolute()  # shards are opened later, when the working directory may have changed
        self.manifest = manifest
        self._ends = np.cumsum([shard["documents"] for shard in manifest["shards"]]).tolist()
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)
        self._verified = False

    @classmethod
    def open(cls, path: str | os.PathLike) -> CorpusRetrieval:
        """Opens the folder `path`.

        Raises:
            OSError: a file cannot be read, is a link out of the folder or not a regular file.
            ValmError: the folder is missing, something else, unfinished, damaged or of another version.
        """
        path = Path(path)
        return cls(path, open_manifest(path, WHAT, VERSION, "valm retrieve", CorpusManifest, FACTS))

    def __reduce__(self) -> tuple[Any, ...]:
        return CorpusRetrieval.open, (self.path,)

    def __len__(self) -> int:
        return self.manifest["documents"]

    @overload
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"documents go from 0 to {len(self) - 1}, got {index}")
        number = bisect.bisect_right(self._ends, index)
        shard = self._shard(number)
        row = index - self._ends[number] + len(shard.groups)
        here = slice(shard.offsets[row], shard.offsets[row + 1])
        ids = shard.image_ids[here].astype(np.int64)
        ids[ids == NO_IMAGE] = -1
        document = {"input_ids": shard.tokens[here], "image_ids": ids}
        if shard.image_scores is not None:
            document["image_scores"] = np.array(shard.image_scores[here])
        return document

    @property
    def k(self) -> int:
        """K, the images per token."""
        return self.manifest["plan"]["k"]

    @property
    def has_scores(self) -> bool:
        return self.manifest["plan"]["scores"]

    @property
    def query(self) -> str:
        """The kind of query that found the images (see `ContextEncoder`)."""
        return self.manifest["plan"]["query"]

    @property
    def query_settings(self) -> dict[str, Any]:
        """The query settings of the `ContextEncoder` that found the images."""
        return {name: self.manifest["plan"][name] for name in QUERY_SETTINGS}

    def clip(self, allow_download: bool = False) -> str | None:
        """The CLIP that made the queries, for `ImageKnowledgeBase.load_clip`. None: the CLIP that the knowledge base
        names.

        Args:
            allow_download: also return a CLIP on a hub.

        Raises:
            ValmError: the note on the CLIP is damaged.
        """
        if not (self.path / CLIP_FILE).is_file():
            return None
        check_own(self.path / CLIP_FILE)
        clip: str = read_json(self.path / CLIP_FILE, "the note on the CLIP", str, "delete it, and retrieve again")
        return clip if allow_download or os.path.isdir(clip) else None

    @property
    def fingerprint(self) -> str:
        """The manifest's checksum, which covers the checksums of all files."""
        return self.manifest["sha256"]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the corpus.

        Raises:
            OSError: a file is a link out of the folder or not a regular file.
            ValmError: the tokenizer's files are damaged.
        """
        for file in self.path.rglob("*"):  # transformers opens files of many names
            check_own(file)
        tokenizer = open_tokenizer(self.path)
        if _tokenizer_hash(tokenizer) != self.manifest["plan"]["tokenizer"] or not self._has_eos_of(tokenizer):
            raise ValmError(f"the tokenizer in {self.path} is not the one that read the corpus: retrieve it again")
        return tokenizer

    def lengths(self) -> np.ndarray:
        """The number of tokens of each document, (documents,) int64."""
        return np.concatenate(
            [np.diff(self._shard(number).offsets) for number in range(len(self._ends))], dtype=np.int64
        )

    def groups(self) -> np.ndarray:
        """The group of each document, (documents,) int64: equal for texts of one image, 0 for a text without image."""
        return np.concatenate([self._shard(number).groups for number in range(len(self._ends))])

    def check_knowledge_base(self, kb: ImageKnowledgeBase) -> None:
        """Raises ValmError unless the images were retrieved from `kb`."""
        if self.manifest["plan"]["knowledge_base"] != kb.fingerprint:
            raise ValmError(f"{self.path} was retrieved from another knowledge base than {kb.path}: retrieve it again")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises ValmError unless `tokenizer` made the tokens, unchanged or as `load_tokenizer` sets it up."""
        made = (tokenizer, beginning_with_bos(tokenizer))
        if self.manifest["plan"]["tokenizer"] not in map(_tokenizer_hash, made):
            raise ValmError(f"{self.path} was read with another tokenizer than the model's: retrieve it again")
        if not self._has_eos_of(tokenizer):
            raise ValmError(
                f"the documents of {self.path} end in token {self.manifest['plan']['eos']}, the model's in "
                f"{tokenizer.eos_token_id} ({tokenizer.eos_token!r}): retrieve it again"
            )

    def _has_eos_of(self, tokenizer: PreTrainedTokenizerFast) -> bool:
        """Whether documents end in the tokenizer's eos, which its hash does not cover."""
        return self.manifest["plan"]["eos"] == tokenizer.eos_token_id

    def verify(self, *, progress: bool = True) -> list[str]:
        """Reads every file and returns the names of those whose content has changed."""
        return damaged_files(self.path, self.manifest, progress)

    def verify_once(self) -> None:
        """Raises ValmError for a damaged file, unless this object was verified before. Training begins with it."""
        if not self._verified:
            if damaged := self.verify():
                raise ValmError(f"{self.path} is damaged, retrieve it again: {', '.join(damaged)}")
            self._verified = True

    def _open_shard(self, number: int) -> _Shard:
        file, record = shard_file(self.path, number), self.manifest["shards"][number]
        table = read_shard(file, corpus_schema(self.k, self.has_scores), record["documents"])
        lists = {name: column_of(table, name) for name in table.column_names if name != "group"}
        documents, tokens = lists["input_ids"], record["tokens"]
        for name, column in lists.items():
            if len(column.values) != tokens or not column.offsets.equals(documents.offsets):
                raise ValmError(
                    f"{file} is damaged: its {name} do not fit its documents of {tokens} tokens; make it again"
                )

        def images(name: str) -> np.ndarray:
            return lists[name].values.flatten().to_numpy().reshape(-1, self.k)

        ids, scores = images("image_ids"), images("image_scores") if self.has_scores else None
        groups = column_of(table, "group").to_numpy()
        return _Shard(documents.offsets.to_numpy(), groups, documents.values.to_numpy(), ids, scores)


def retrieve_corpus(
    documents: Iterable[str] | Iterable[Sequence[int]],
    retriever: Retriever,
    out: str | os.PathLike,
    *,
    part_bytes: int = PART_BYTES,
    scores: bool = True,
    progress: bool = True,
    run: Runner = run_here,
) -> CorpusRetrieval:
    """Retrieves the images of every token of `documents` and writes the folder `out`.

    A killed retrieval resumes, with the same bytes as in one run: it skips the documents of finished shards, which must
    not have changed. If `out` is finished, its documents are compared and it is opened.

    Args:
        documents: texts, which the retriever's tokenizer reads (`valm.corpus.texts`), or token ids. The calling thread
            reads them once, in order, so they need not fit into memory.
        part_bytes: bytes of a shard's texts, or of its 32-bit token ids.
        scores: also write the score of each image, which `min_score` needs.
        run: where shards are made: here, or on the machines of a `valm.store.ray.RayRun`, which get the documents.

    Raises:
        ValmError: there are no documents, a document is empty or too long, or `out` holds something else or was begun
            with other documents, another knowledge base or other settings.
    """
    if len(retriever.kb) > NO_IMAGE:
        raise ValmError(f"ids of {len(retriever.kb):,} images do not fit into 32 bits")
    encoder = retriever.encoder
    plan = {
        "part_bytes": part_bytes,
        "tokenizer": _tokenizer_hash(encoder.tokenizer),
        "eos": encoder.tokenizer.eos_token_id,
        "knowledge_base": retriever.kb.fingerprint,
        "index": _index_entry(retriever.index),
        "k": retriever.k,
        **encoder.query_settings,
        "scores": scores,
    }
    if encoder.alignment is not None and encoder.alignment.one_document:
        plan["one_document"] = True
    work = partial(_retrieve_part, retriever=retriever, index=plan["index"], scores=scores)
    with (
        sharded_build(out, WHAT, plan, CorpusRecord) as build,
        ProgressBar("retrieve", " tokens", None, progress) as bar,
    ):
        build.write(work, _parts(documents, part_bytes, bar), run, bar)
        if not build.finished:
            facts = totals(build.done().values(), FACTS)
            if facts["documents"] == 0:
                build.abandon()
                raise ValmError("the corpus has no documents: it has no text")
            try:
                encoder.tokenizer.save_pretrained(build.out)
            except Exception as error:  # tokenizers raises its own type for a full disk
                raise ValmError(f"cannot write the tokenizer into {build.out}: {error}. Run it again") from error
            build.finish(version=VERSION, **facts)
    return CorpusRetrieval.open(out)


def note_clip(folder: Path, source: str) -> None:
    """Notes in the retrieval in `folder` that the user loaded its CLIP from `source`."""
    write_json(folder / CLIP_FILE, os.path.abspath(source) if os.path.isdir(source) else source)


def _parts(documents: Iterable[Any], part_bytes: int, bar: ProgressBar) -> Iterator[Part]:
    """`documents` in lists of `part_bytes`, read lazily. For files, the `bar` gets an estimate of the number of parts,
    from the share of bytes read."""
    part: list[Any] = []
    count = size = 0
    for document in documents:
        if not len(document):
            raise ValmError("the corpus has an empty document")
        if isinstance(document, str):
            if len(document) > MAX_DOCUMENT:
                raise ValmError(f"the corpus has {TOO_LONG}")
            document = document if isinstance(document, Caption) else utf8(document)
            size += len(document.encode())
        else:
            size += 4 * len(document)
        part.append(document)
        if size >= part_bytes:
            count += 1
            if isinstance(documents, FileDocuments):
                bar.shards = round(count / documents.share)
            yield Part(fingerprint(part), part)
            part, size = [], 0
    if part:
        bar.shards = count + 1
        yield Part(fingerprint(part), part)


def _index_entry(index: Any) -> Any:
    """The plan's entry for an index: the parameters of a faiss index, "exact", or the name of the user's class."""
    if isinstance(index, FaissIndex):
        return asdict(index.parameters)
    if isinstance(index, FlatIPIndex):
        return "exact" if index.dtype in ("float16", "float32") else f"exact, {index.dtype}"
    return "exact" if isinstance(index, ShardedIndex) else f"{type(index).__module__}.{type(index).__qualname__}"


def _retrieve_part(
    part: list[str] | list[Sequence[int]], progress: Progress, *, retriever: Retriever, index: Any, scores: bool
) -> tuple[pa.Table, dict[str, int]]:
    """The shard of the documents `part`."""
    if _index_entry(retriever.index) != index:  # a worker process opens the index itself
        raise ValmError(
            f"the index of {retriever.kb.path} was made or removed after the retrieval began: restore it and run the "
            "retrieval again"
        )
    # cached segments are not encoded, and the segments encoded together affect rounding
    retriever.cache.clear()
    documents, groups = tokenized(part, retriever.encoder.tokenizer)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int32)
    count = int(offsets[-1])
    progress.begin(count)
    image_ids = np.empty((count, retriever.k), np.uint32)
    image_scores = np.empty((count, retriever.k), np.float32)
    for batch in batches_by_length(list(map(len, documents)), BATCH_TOKENS):
        ids, mask = padded([documents[index] for index in batch])
        found, score = (tensor.cpu() for tensor in retriever.find(ids, mask))  # (B, T, K)
        images = torch.where(found < 0, NO_IMAGE, found)
        for row, index in enumerate(batch):
            here, length = slice(offsets[index], offsets[index + 1]), len(documents[index])
            image_ids[here] = images[row, :length].numpy()
            image_scores[here] = score[row, :length].numpy()
        progress.advance(int(mask.sum()))

    def column(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    def images_of(values: np.ndarray) -> pa.Array:
        return column(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), retriever.k))

    tokens = pa.array(np.concatenate([np.empty(0, np.int32), *documents], dtype=np.int32))
    columns = [column(tokens), pa.array(groups), images_of(image_ids), *([images_of(image_scores)] if scores else [])]
    table = pa.Table.from_arrays(columns, schema=corpus_schema(retriever.k, scores))
    return table, {"documents": len(documents), "tokens": count}


def tokenized(texts: Sequence[Any], tokenizer: PreTrainedTokenizerFast) -> tuple[list[Any], np.ndarray]:
    """Texts as documents of token ids (`tokenize_documents`), and their `groups`, (documents,) int64. Documents that
    are token ids already do not change."""
    if not texts or not isinstance(texts[0], str):
        return list(texts), np.zeros(len(texts), np.int64)
    documents = tokenize_documents(texts, tokenizer)
    groups = [_group(text) for text, document in zip(texts, documents, strict=True) if document]
    return [document for document in documents if document], np.array(groups, np.int64)


def _group(text: str) -> int:
    """A 63-bit number for the image of a caption; 0 for a text without an image."""
    if not isinstance(text, Caption):
        return 0
    return 1 + int.from_bytes(hashlib.sha256(text.image.encode()).digest()[:8], "big") // 4


def _tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["padding"], state["truncation"]  # left by the tokenizer's last call
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
