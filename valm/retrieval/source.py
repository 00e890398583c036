"""The source of a model's images: the knowledge base, the CLIP and the kind of queries, and their places here.

Names and checksums are part of the model's config and go wherever the model goes. Paths on this machine are in
PLACES_FILE next to the config, which is not published.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typing_extensions import TypedDict

from valm.clip.clip import Clip
from valm.clip.text_tower import fastest_dtype
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever
from valm.store.files import PathText, read_json, relative_path, write_json
from valm.store.folders import PLACES_FILE, current_files
from valm.store.pretrained import from_pretrained
from valm_kernels.json_files import check_own

# The Trainer uploads a checkpoint folder whole, so `save_pretrained` notes its places in the folder above.
CHECKPOINT = re.compile(r"checkpoint-\d+")


class Places(TypedDict, total=False):
    """The content of PLACES_FILE. Paths are relative to the file's folder; clip may be a name on a hub. base: an
    adapter's base, if it is a folder."""

    knowledge_base: PathText
    clip: PathText
    base: PathText


@dataclass(frozen=True)
class RetrievalSource:
    """The source of a model's images.

    Attributes:
        query: the kind of retrieval query of a `ContextEncoder`.
        clip_name, clip_sha256: the CLIP's name and its `Clip.weights_hash`.
        knowledge_base_name, knowledge_base_sha256: the name of the folder and its `ImageKnowledgeBase.fingerprint`;
            None for the query control (Blind), which needs only a CLIP.
        overlap, min_tokens: rules of the segments that CLIP reads (`ContextEncoder`); None: its defaults.
        precision: precision of the queries in training.
        reading_precision: precision of the retriever that the model was saved with, if it was chosen. None: the
            precision that is fast on this machine.
        knowledge_base, clip: absolute paths, or a CLIP's name on a hub; clip only without a knowledge base, which names
            its own CLIP. None: not known on this machine.
    """

    query: str
    clip_name: str | None = None
    clip_sha256: str | None = None
    knowledge_base_name: str | None = None
    knowledge_base_sha256: str | None = None
    overlap: int | None = None
    min_tokens: int | None = None
    precision: str | None = None
    reading_precision: str | None = None
    knowledge_base: Path | None = None
    clip: str | None = None

    @classmethod
    def of_knowledge_base(cls, kb: ImageKnowledgeBase, query: str, **of_queries: Any) -> RetrievalSource:
        """The source of images from `kb`. of_queries: overlap, min_tokens and precision."""
        path, clip = Path(kb.path).absolute(), kb.manifest["clip"]
        names = {"clip_name": clip["name"], "clip_sha256": clip["weights_hash"], "knowledge_base_name": path.name}
        return cls(query, **names, knowledge_base_sha256=kb.fingerprint, knowledge_base=path, **of_queries)

    @classmethod
    def of_retriever(cls, retriever: object) -> RetrievalSource | None:
        """The source of `retriever`; None for a user's own class, which a file cannot describe."""
        if isinstance(retriever, Retriever):
            return cls.of_knowledge_base(retriever.kb, **retriever.encoder.query_settings)
        if isinstance(retriever, BlindRetriever):
            if retriever.kb is not None:
                return cls.of_knowledge_base(retriever.kb, **retriever.encoder.query_settings)
            encoder, clip = retriever.encoder, retriever.encoder.clip
            place = clip.source
            if place is not None and os.path.isdir(place):
                place = os.path.abspath(place)
            named: Any = {"clip_name": clip.name, "clip_sha256": clip.weights_hash, "clip": place}
            return cls(**encoder.query_settings, **named)
        return None

    @classmethod
    def of_config(cls, identity: Any, folder: str | os.PathLike | None = None) -> RetrievalSource | None:
        """The source in a model's config, with the places noted in the model's `folder`; None if there is none.

        Raises:
            ValmError: the config or the places are damaged.
        """
        if identity is None:
            return None
        try:
            source = cls(**identity)
        except TypeError as error:
            raise ValmError(f"the config's entry for retrieval is damaged: {error}") from error
        return source if folder is None else source.in_places(folder)

    def identity(self) -> dict[str, Any]:
        """The source's entry in the config."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: found[name] for name in found if name not in Places.__annotations__ and found[name] is not None}

    def in_places(self, folder: str | os.PathLike) -> RetrievalSource:
        """This source with the places noted in the model's `folder`."""
        places, beside = read_places(folder), os.path.realpath(places_folder(folder))
        noted, clip = places.get("knowledge_base"), places.get("clip")
        if clip is not None:  # a relative path, or a name on a hub
            place = os.path.normpath(os.path.join(beside, clip))
            clip = place if clip.startswith(os.pardir) or os.path.isdir(place) else clip
        kb = None if noted is None else Path(os.path.normpath(os.path.join(beside, noted)))
        return replace(self, knowledge_base=kb, clip=clip)

    def same_images(self, found: RetrievalSource) -> str | None:
        """A sentence on the difference if `found` names another knowledge base of the same CLIP; otherwise None.

        Raises:
            ValmError: `found` names another CLIP.
        """
        if self.clip_sha256 != found.clip_sha256:
            raise ValmError(
                f"this model was saved with the CLIP {_named(self.clip_name, self.clip_sha256)}, but its images would "
                f"be found by {_named(found.clip_name, found.clip_sha256)}: give it a knowledge base of its own CLIP"
            )
        hashes = self.knowledge_base_sha256, found.knowledge_base_sha256
        if hashes[0] == hashes[1]:
            return None
        return (
            f"this model was saved with the knowledge base {_named(self.knowledge_base_name, hashes[0])}, but its "
            f"images now come from {_named(found.knowledge_base or found.knowledge_base_name, hashes[1])}"
        )

    def missing(self) -> str | None:
        """A sentence on what is missing here, with the remedy, or None. A CLIP on a hub counts as present."""
        if self.knowledge_base_sha256 is not None or self.knowledge_base is not None:
            if self.knowledge_base is None:
                named = _named(self.knowledge_base_name, self.knowledge_base_sha256)
                return f"nothing says where the model's knowledge base {named} is: give it as kb (--kb)"
            if not self.knowledge_base.is_dir():
                return f"the model's knowledge base {self.knowledge_base} is not there: give it as kb (--kb)"
            return None
        if self.clip is None:
            named = _named(self.clip_name, self.clip_sha256)
            return f"nothing says where the model's CLIP {named} is: give it as clip (--clip)"
        if os.path.isabs(self.clip) and not os.path.isdir(self.clip):
            return f"the model's CLIP {self.clip} is not there: give it as clip (--clip)"
        return None


def _named(name: object, sha256: str | None) -> str:
    return f"{name} (SHA-256 {str(sha256)[:12]})"


def places_folder(folder: str | os.PathLike) -> Path:
    """The folder that notes the places of the model in `folder`: the same, or the one above a training's checkpoint."""
    folder = Path(folder)
    own = current_files(folder) / PLACES_FILE
    return folder if os.path.lexists(own) or not _is_of_training(folder) else folder.resolve().parent


def _is_of_training(folder: Path) -> bool:
    return CHECKPOINT.fullmatch(folder.resolve().name) is not None


def read_places(folder: str | os.PathLike) -> Places:
    """The places noted for the model in `folder`, or an empty dict.

    Raises:
        OSError: the file is a link out of its folder or not a regular file.
        ValmError: the file is damaged.
    """
    file = current_files(places_folder(folder)) / PLACES_FILE
    if not os.path.lexists(file):
        return {}
    check_own(file)
    return read_json(file, "the note on where the images are", Places, "delete it and give the kb")


def write_places(
    source: RetrievalSource | None,
    folder: str | os.PathLike,
    *,
    place: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
) -> None:
    """Notes where the images of the model in `folder` and its `base` are, if known.

    place: where `folder` will be moved.
    """
    folder = Path(folder)
    place = folder if place is None else Path(place)
    of_training = _is_of_training(place)
    if of_training:
        (folder / PLACES_FILE).unlink(missing_ok=True)  # it would be read first
        folder = place = place.resolve().parent
    named = {} if source is None else {"knowledge_base": source.knowledge_base, "clip": source.clip}
    places = {
        name: relative_path(path, place) if os.path.isabs(path) else str(path)
        for name, path in {**named, "base": base}.items()
        if path is not None
    }
    file = folder / PLACES_FILE
    if places:
        write_json(file, places)
    elif not of_training:  # in training, other checkpoints use the file too
        file.unlink(missing_ok=True)


def open_encoder(
    place: ImageKnowledgeBase | str,
    query: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    clip: str | None = None,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    overlap: int | None = None,
    min_tokens: int | None = None,
) -> ContextEncoder:
    """The encoder of queries: the CLIP that `place` names, on `device`, for ids of `tokenizer`.

    Args:
        place: the knowledge base, or the CLIP of a source without one (`RetrievalSource.clip`).
        query, tokenizer, overlap, min_tokens: as for `ContextEncoder`.
        dtype: precision of the text tower; by default the fastest on the device (`fastest_dtype`). Name it if images
            are stored, which should not depend on the machine that found them.
        clip: the CLIP, if it has moved (see `Clip.load`).
        allow_download: as in `ImageKnowledgeBase.load_clip`.

    Raises:
        ValmError: the CLIP is missing, damaged, another CLIP than the knowledge base's, or not downloaded; or the text
            tower does not support this precision.
    """
    if isinstance(place, ImageKnowledgeBase):
        loaded = place.load_clip(clip, allow_download=allow_download)
    elif clip is None and not os.path.isdir(place) and not allow_download:
        raise ValmError(
            f"the model names the CLIP {place!r}, which is not a folder here: give its folder or name (--clip), or "
            "allow its download (--allow-download) if you trust both"
        )
    else:
        loaded = Clip.load(clip or place)
    segments = {"overlap": overlap, "min_tokens": min_tokens}
    dtype = dtype or fastest_dtype(torch.device(device))
    return ContextEncoder(loaded.to(device), tokenizer=tokenizer, query=query, dtype=dtype, **segments)


def open_retriever(
    source: RetrievalSource,
    tokenizer: PreTrainedTokenizerFast,
    num_images: int,
    *,
    blind: bool = False,
    threshold: bool = False,
    as_trained: bool = False,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> Retriever | BlindRetriever:
    """The retriever that `source` describes, for a model that reads with `tokenizer`.

    Args:
        num_images: K of a Retriever.
        blind: whether the images are the queries (the query control), so that a CLIP is enough.
        threshold: whether a blind model has a score threshold, so that it needs the knowledge base too.
        as_trained: whether the default dtype is the precision in training, because the model depends on it. The
            precision of the retriever that the model was saved with comes first.
        dtype, how: dtype, and clip, allow_download and device, as in `open_encoder`.

    Raises:
        ValmError: the knowledge base or the CLIP is missing or damaged, or they do not belong together; or the text
            tower does not support this precision.
    """
    place: Any = source.clip
    kb = None
    if place is None or not blind or threshold:
        missing = source.missing()
        if source.knowledge_base is None:
            raise ValmError(missing or "this model needs a knowledge base, not only a CLIP: give it as kb (--kb)")
        place = kb = ImageKnowledgeBase.open(source.knowledge_base)
    noted = source.reading_precision or (source.precision if as_trained else None)
    if noted is not None:
        dtype = dtype or getattr(torch, noted)
    segments: Any = {"overlap": source.overlap, "min_tokens": source.min_tokens}
    encoder = open_encoder(place, source.query, tokenizer, dtype=dtype, **segments, **how)
    if blind:
        return BlindRetriever(encoder, kb=kb if threshold else None)
    assert kb is not None
    return Retriever(encoder, kb, num_images)


def open_tokenizer(folder: str | os.PathLike, base: str | None) -> Any:
    """The tokenizer saved in the model's `folder`, or the tokenizer of its `base`, a folder or name.

    Raises:
        ValmError: neither contains a tokenizer here.
    """
    files = current_files(Path(folder))
    place: Any = files if (files / "tokenizer_config.json").is_file() else base
    try:
        return from_pretrained(AutoTokenizer, place, f"the tokenizer in {place}", local_files_only=True)
    except ValmError as error:
        raise ValmError(
            f"no tokenizer can be loaded from {place}: save one there by tokenizer.save_pretrained"
        ) from error
