"""The note in a checkpoint folder on what finds its model's images: knowledge base, CLIP, kind of query, index."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from transformers import PreTrainedTokenizerFast

from valm.clip import Clip
from valm.errors import ValmError
from valm.files import read_json, write_json
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.index_parameters import index_parameters
from valm.retrieval.retriever import BlindRetriever, Retriever
from valm.whole_folder import current_files
from valm_kernels.json_files import PathText

RETRIEVAL_FILE = "retrieval.json"


class _NoteFields(TypedDict):
    query: Literal["eot", "state", "self"]


class NoteFile(_NoteFields, total=False):
    """The keys of retrieval.json."""

    knowledge_base: PathText
    clip: str
    index: Any


@dataclass(frozen=True)
class RetrievalNote:
    """How to retrieve the images of a saved model.

    Paths are absolute here and relative to the folder in its file, so that both can be moved together.

    Attributes:
        knowledge_base: its folder; None for a blind model, which needs a CLIP only.
        clip: the CLIP of a model without a knowledge base (`Clip.load`); a knowledge base has its own.
        query: the kind of retrieval query: that of a `ContextEncoder`, or "self" (`SelfRetriever`).
        index: the index when the model was saved, for information; opening uses the knowledge base's own.
    """

    knowledge_base: Path | None
    query: str
    index: Any = "exact"
    clip: str | None = None

    @classmethod
    def of_knowledge_base(cls, kb: ImageKnowledgeBase, query: str) -> RetrievalNote:
        index = index_parameters(kb)
        return cls(Path(kb.path).absolute(), query, "exact" if index is None else asdict(index))

    @classmethod
    def of_retriever(cls, retriever: object) -> RetrievalNote | None:
        """The note of `retriever`; None for a retriever of the user's own, which a file cannot describe."""
        if isinstance(retriever, Retriever):
            return cls.of_knowledge_base(retriever.kb, retriever.encoder.query)
        if isinstance(retriever, BlindRetriever):
            source = retriever.encoder.clip.source
            if source is not None and Path(source).is_dir():
                source = str(Path(source).absolute())
            return cls(None, retriever.encoder.query, clip=source)
        return None

    @classmethod
    def read(cls, folder: str | os.PathLike) -> RetrievalNote | None:
        """The note in `folder`, or None.

        Raises:
            ValmError: it is damaged.
        """
        file = current_files(Path(folder)) / RETRIEVAL_FILE
        if not os.path.lexists(file):
            file = Path(folder) / RETRIEVAL_FILE
        if not os.path.lexists(file):
            return None
        note: NoteFile = read_json(file, "the note on retrieval", NoteFile, "delete it and give the kb")
        kb, clip = note.get("knowledge_base"), note.get("clip")
        if kb is None and clip is None:
            raise ValmError(f"{file} names neither a knowledge_base nor a clip")
        if clip is not None and (Path(folder) / clip).is_dir():
            clip = str((Path(folder) / clip).absolute())
        return cls(None if kb is None else (Path(folder) / kb).absolute(), note["query"], note.get("index"), clip)

    def write(self, folder: str | os.PathLike, *, place: str | os.PathLike | None = None) -> None:
        """Writes the note into `folder`, which will be moved to `place` if that is given."""
        note: dict[str, Any] = {"query": self.query}
        place = folder if place is None else place
        if self.knowledge_base is not None:
            note |= {"knowledge_base": os.path.relpath(self.knowledge_base, place), "index": self.index}
        if self.clip is not None:
            note["clip"] = os.path.relpath(self.clip, place) if os.path.isabs(self.clip) else self.clip
        write_json(Path(folder) / RETRIEVAL_FILE, note)

    def missing(self) -> str | None:
        """What the note names but does not exist, in a sentence with the remedy; None if all exists.

        A CLIP on a hub is assumed to exist.
        """
        if self.knowledge_base is not None and not self.knowledge_base.is_dir():
            return f"the model's knowledge base {self.knowledge_base} is not there: give it as kb (--kb)"
        # `read` makes the path of an existing folder absolute
        if self.clip is not None and self.clip.startswith((os.sep, os.pardir)) and not os.path.isdir(self.clip):
            return f"the model's CLIP {self.clip} is not there: give it as clip (--clip)"
        return None

    def open(
        self,
        tokenizer: PreTrainedTokenizerFast,
        k: int,
        *,
        blind: bool = False,
        clip: str | None = None,
        allow_download: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Retriever | BlindRetriever:
        """The retriever of `k` images for a model that reads with `tokenizer`.

        Args:
            dtype: precision of the text tower, as for `ContextEncoder`.

        Raises:
            ValmError: the knowledge base or the CLIP is missing or damaged, or they do not belong together; or the text
                tower cannot have this precision.
        """
        kb = None if self.knowledge_base is None else ImageKnowledgeBase.open(self.knowledge_base)
        if kb is None or (blind and self.clip is not None):
            source = clip or self.clip
            assert source is not None  # `read` and `of_retriever` ensure it
            if clip is None and not os.path.isdir(source) and not allow_download:
                raise ValmError(
                    f"the note on retrieval says that the CLIP is {source!r}, which is no folder here: give its folder "
                    "or name (--clip), or allow its download (--allow-download) if you trust both"
                )
            loaded = Clip.load(source)
        else:
            loaded = kb.load_clip(clip, allow_download=allow_download)
        encoder = ContextEncoder(loaded.to(device), tokenizer=tokenizer, query=self.query, dtype=dtype)
        if blind:
            return BlindRetriever(encoder)
        if kb is None:
            raise ValmError("the note on retrieval names no knowledge base, and this model is not blind")
        return Retriever(encoder, kb, k)
