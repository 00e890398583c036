"""The note in a checkpoint folder on what finds its model's images: knowledge base, CLIP, kind of query, index."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.index_parameters import index_parameters
from valm.retrieval.retriever import BlindRetriever, Retriever
from valm.store.files import is_folder, read_json, relative_path, write_json
from valm.store.whole_folder import NOTE, current_files
from valm_kernels.json_files import Count, PathText, Sha256

# Keys of the file, and attributes of the note, that are left out where they are None.
OPTIONAL = ("knowledge_base_sha256", "overlap", "min_tokens")


class _NoteFields(TypedDict):
    query: Literal["eot", "state"]
    clip_name: str
    clip_sha256: Sha256


class NoteFile(_NoteFields, total=False):
    """The keys of retrieval.json."""

    knowledge_base: PathText
    knowledge_base_sha256: Sha256
    clip: str
    index: Any
    overlap: Count
    min_tokens: Count


def _named(name: object, sha256: str | None) -> str:
    return f"{name} (SHA-256 {str(sha256)[:12]})"


@dataclass(frozen=True)
class RetrievalNote:
    """How to retrieve the images of a saved model.

    Paths are absolute here and relative to the folder in its file, so that both can be moved together.

    Attributes:
        knowledge_base: its folder; None for a blind model, which needs a CLIP only.
        query: the kind of retrieval query (`ContextEncoder`).
        clip_name, clip_sha256: of the CLIP's weights (`Clip.weights_hash`).
        index: the index when the model was saved, for information; opening uses the knowledge base's own.
        clip: the CLIP of a model without a knowledge base (`Clip.load`); a knowledge base has its own.
        knowledge_base_sha256: of its content (`ImageKnowledgeBase.fingerprint`); None without one.
        overlap, min_tokens: of the segments that CLIP reads (`ContextEncoder`); None: its defaults.
    """

    knowledge_base: Path | None
    query: str
    clip_name: str
    clip_sha256: str
    index: Any = "exact"
    clip: str | None = None
    knowledge_base_sha256: str | None = None
    overlap: int | None = None
    min_tokens: int | None = None

    @classmethod
    def of_knowledge_base(
        cls, kb: ImageKnowledgeBase, query: str, *, overlap: int | None = None, min_tokens: int | None = None
    ) -> RetrievalNote:
        index, clip = index_parameters(kb), kb.manifest["clip"]
        return cls(
            Path(kb.path).absolute(),
            query,
            clip["name"],
            clip["weights_hash"],
            "exact" if index is None else asdict(index),
            knowledge_base_sha256=kb.fingerprint,
            overlap=overlap,
            min_tokens=min_tokens,
        )

    @classmethod
    def of_retriever(cls, retriever: object) -> RetrievalNote | None:
        """The note of `retriever`; None for a retriever of the user's own, which a file cannot describe."""
        if isinstance(retriever, Retriever):
            return cls.of_knowledge_base(retriever.kb, retriever.encoder.query, **retriever.encoder.segments)
        if isinstance(retriever, BlindRetriever):
            clip = retriever.encoder.clip
            source = clip.source
            if source is not None and Path(source).is_dir():
                source = str(Path(source).absolute())
            segments: Any = retriever.encoder.segments
            return cls(None, retriever.encoder.query, clip.name, clip.weights_hash, clip=source, **segments)
        return None

    @classmethod
    def chosen(cls, folder: str | os.PathLike, kb: str | os.PathLike | None) -> RetrievalNote:
        """What finds the images of the model in `folder`: the knowledge base `kb` if it is given, or else its note.

        Raises:
            ValmError: neither says it, or the note is damaged.
        """
        note = cls.read(folder)
        if kb is not None:
            if note is None:
                warnings.warn(
                    f"{folder} does not say how it retrieves (it has no {NOTE}): it is opened with 'eot' queries",
                    stacklevel=2,
                )
                return cls.of_knowledge_base(ImageKnowledgeBase.open(kb), "eot")
            return replace(note, knowledge_base=Path(kb).absolute(), clip=None)
        if note is None:
            raise ValmError(f"{folder} names no knowledge base: give it as kb (--kb)")
        return note

    @classmethod
    def read(cls, folder: str | os.PathLike) -> RetrievalNote | None:
        """The note in `folder`, or None.

        Raises:
            ValmError: it is damaged.
        """
        file = current_files(Path(folder)) / NOTE
        if not os.path.lexists(file):
            file = Path(folder) / NOTE
        if not os.path.lexists(file):
            return None
        note: NoteFile = read_json(file, "the note on retrieval", NoteFile, "delete it and give the kb")
        kb, clip = note.get("knowledge_base"), note.get("clip")
        if kb is None and clip is None:
            raise ValmError(f"{file} names neither a knowledge_base nor a clip")
        if clip is not None and is_folder(Path(folder) / clip):
            clip = str((Path(folder) / clip).absolute())
        kb_path = None if kb is None else (Path(folder) / kb).absolute()
        others: Any = {key: note.get(key) for key in OPTIONAL}
        return cls(kb_path, note["query"], note["clip_name"], note["clip_sha256"], note.get("index"), clip, **others)

    def write(self, folder: str | os.PathLike, *, place: str | os.PathLike | None = None) -> None:
        """Writes the note into `folder`, which will be moved to `place` if that is given."""
        note: dict[str, Any] = {name: getattr(self, name) for name in ("query", "clip_name", "clip_sha256")}
        place = folder if place is None else place
        if self.knowledge_base is not None:
            note |= {"knowledge_base": relative_path(self.knowledge_base, place), "index": self.index}
        if self.clip is not None:
            note["clip"] = relative_path(self.clip, place) if os.path.isabs(self.clip) else self.clip
        note |= {key: value for key in OPTIONAL if (value := getattr(self, key)) is not None}
        write_json(Path(folder) / NOTE, note)

    def other_images(self, found: RetrievalNote) -> str | None:
        """What differs, in a sentence, if the images of `found` come from another knowledge base than these, of the
        same CLIP; None if they are the same.

        Raises:
            ValmError: they come by another CLIP.
        """
        if self.clip_sha256 != found.clip_sha256:
            raise ValmError(
                f"this model was saved with the CLIP {_named(self.clip_name, self.clip_sha256)}, and its images would "
                f"be found by {_named(found.clip_name, found.clip_sha256)}: give it a knowledge base of its own CLIP"
            )
        hashes = (self.knowledge_base_sha256, found.knowledge_base_sha256)
        if None in hashes or hashes[0] == hashes[1]:
            return None
        names = [note.knowledge_base and str(note.knowledge_base) for note in (self, found)]
        return (
            f"this model was saved with the knowledge base {_named(names[0], hashes[0])}, and its images are now those "
            f"of {_named(names[1], hashes[1])}"
        )

    def missing(self) -> str | None:
        """What the note names but does not exist, in a sentence with the remedy; None if all exists.

        A CLIP on a hub is assumed to exist.
        """
        if self.knowledge_base is not None and not is_folder(self.knowledge_base):
            return f"the model's knowledge base {self.knowledge_base} is not there: give it as kb (--kb)"
        # `read` makes the path of an existing folder absolute
        if self.clip is not None and self.clip.startswith((os.sep, os.pardir)) and not os.path.isdir(self.clip):
            return f"the model's CLIP {self.clip} is not there: give it as clip (--clip)"
        return None

    def open_knowledge_base(self) -> ImageKnowledgeBase:
        """The knowledge base that the note names.

        Raises:
            ValmError: it names none, as that of a blind model; or the knowledge base is missing or damaged.
        """
        if self.knowledge_base is None:
            raise ValmError(
                "the note on retrieval names no knowledge base, which only a blind model can do without: give it as kb "
                "(--kb)"
            )
        return ImageKnowledgeBase.open(self.knowledge_base)


def open_encoder(
    place: ImageKnowledgeBase | str,
    query: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    clip: str | None = None,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    overlap: int | None = None,
    min_tokens: int | None = None,
) -> ContextEncoder:
    """What makes the queries: the CLIP that `place` names, on `device`, for ids of `tokenizer`.

    Args:
        place: the knowledge base, or the CLIP of a note without one (`RetrievalNote.clip`).
        query, tokenizer, dtype, overlap, min_tokens: as for `ContextEncoder`.
        clip: the CLIP, if it has moved from there (see `Clip.load`).
        allow_download: as in `ImageKnowledgeBase.load_clip`.

    Raises:
        ValmError: the CLIP is missing, damaged or not that of the knowledge base, or would have to be downloaded; or
            the text tower cannot have this precision.
    """
    if isinstance(place, ImageKnowledgeBase):
        loaded = place.load_clip(clip, allow_download=allow_download)
    elif clip is None and not os.path.isdir(place) and not allow_download:
        raise ValmError(
            f"the note on retrieval says that the CLIP is {place!r}, which is no folder here: give its folder or name "
            "(--clip), or allow its download (--allow-download) if you trust both"
        )
    else:
        loaded = Clip.load(clip or place)
    segments = {"overlap": overlap, "min_tokens": min_tokens}
    return ContextEncoder(loaded.to(device), tokenizer=tokenizer, query=query, dtype=dtype, **segments)
