"""Controls of an evaluation: other images, or none, instead of those that a model's retriever finds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from valm.clip.clip import Clip
from valm.clip.read_image import read_image
from valm.errors import ValmError
from valm.knowledge_base.sources.folder import find_images
from valm.model.image_model import ImageModel
from valm.retrieval.context import ContextCache
from valm.retrieval.retriever import BlindRetriever, NoImages, Retrieved, Retriever

RETRIEVAL = ("on", "off", "random")


class _OtherVectors:
    """A retriever that finds the same images but returns other vectors."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever
        self.k, self.dim = retriever.k, retriever.dim

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        return self._replaced(self.retriever(input_ids, attention_mask))

    def start(self, batch: int) -> ContextCache:
        return self.retriever.start(batch)

    def step(self, input_ids: Tensor, state: ContextCache, attention_mask: Tensor | None = None) -> Retrieved:
        return self._replaced(self.retriever.step(input_ids, state, attention_mask))

    def _replaced(self, found: Retrieved) -> Retrieved:
        return found._replace(image_pool=self.vectors_of(found.image_ids.cpu()).to(found.image_pool.device))

    def vectors_of(self, ids: Tensor) -> Tensor:
        """(n, E) float32: the replacements of the images `ids` (n,)."""
        raise NotImplementedError


class Replaced(_OtherVectors):
    """vectors: (N, E), for each image of the knowledge base the vector that replaces its own."""

    def __init__(self, retriever: Retriever, vectors: Tensor):
        super().__init__(retriever)
        self.vectors = vectors

    def vectors_of(self, ids: Tensor) -> Tensor:
        return self.vectors[ids]


class RandomImages(_OtherVectors):
    """Every image is replaced by a random one of the knowledge base, always the same one for a seed, with the score of
    the image that it replaces."""

    def __init__(self, retriever: Retriever, seed: int):
        super().__init__(retriever)
        self.other = torch.randperm(len(retriever.kb), generator=torch.Generator().manual_seed(seed))  # (N,)

    def vectors_of(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.retriever.kb.gather(self.other[ids].numpy())).float()


class FixedImages(_OtherVectors):
    """Every token that has images sees the same K: the first of `vectors` (n, E), repeated if there are fewer, with the
    scores of the images that they replace."""

    def __init__(self, retriever: Retriever, vectors: Tensor):
        super().__init__(retriever)
        self.vectors = vectors[: self.k]

    def _replaced(self, found: Retrieved) -> Retrieved:
        index, device = found.image_index, found.image_index.device
        none = (index < 0).all(-1, keepdim=True)  # (B, T, 1)
        slots = torch.arange(self.k, device=device) % len(self.vectors)  # (K,)
        return Retrieved(
            self.vectors.to(device),
            slots.expand(index.shape).masked_fill(none, -1),
            torch.full((len(self.vectors),), -1, device=device),
            # a slot may have been empty
            found.scores.where(index >= 0, found.scores.amax(-1, keepdim=True)).masked_fill(none, -torch.inf),
        )


def read_images(files: Sequence[Path]) -> list[Image.Image]:
    """The images in `files`.

    Raises:
        ValmError: one cannot be read.
    """
    images = []
    for file in files:
        try:
            images.append(read_image(file))
        except Exception as error:  # decoders raise many types for damaged bytes
            raise ValmError(f"cannot read the image {file.name}: {error}") from error
    return images


def images_in(folder: str | os.PathLike, clip: Clip, k: int) -> Tensor:
    """(n, E) float32: the first `k` images under `folder`, in the order of their names, encoded.

    Raises:
        ValmError: there is no image, or one cannot be read.
    """
    names = find_images(Path(folder)).images[:k]
    images = read_images([Path(folder) / name for name in names])
    return clip.encode_images(images)


def images_fingerprint(folder: str | os.PathLike) -> str:
    """SHA-256 over the names and contents of the images under `folder`. One that cannot be read counts by its name:
    `switch_images` refuses it where a model sees it.

    Raises:
        ValmError: there are none.
    """
    found = hashlib.sha256()
    for name in find_images(Path(folder)).images:
        file = Path(folder) / name
        found.update(os.fsencode(name))
        with suppress(ValmError, OSError):
            found.update(file.read_bytes())
    return found.hexdigest()


def switch_images(
    model: ImageModel, retrieval: str = "on", *, replace: str | os.PathLike | None = None, seed: int = 0
) -> None:
    """Sets which images `model` sees from now on.

    Args:
        retrieval: "on" those that its retriever finds, "off" none, "random" random ones of its knowledge base.
        replace: a folder of images that every token which has retrieved ones sees instead of them.
        seed: of the random images.

    Raises:
        ValmError: a value is invalid, or the model cannot see such images.
    """
    if retrieval not in RETRIEVAL:
        raise ValmError(f"retrieval must be one of {', '.join(RETRIEVAL)}, got {retrieval!r}")
    if replace is not None and retrieval != "on":
        raise ValmError(f"retrieval={retrieval} and images to replace it by exclude each other: give one of the two")
    options = model.fusion_options
    if options.num_images == 0:
        if retrieval == "random" or replace is not None:
            raise ValmError("this model sees no images (K = 0), so there are none to replace")
        return
    if retrieval == "off":
        model.set_retriever(NoImages(options.num_images, options.image_dim))
        return
    retriever: Any = model.retriever
    if retriever is None:
        raise ValmError(
            f"this model sees {options.num_images} images a token, but nothing says where they are: give a knowledge "
            "base (kb), or switch its images off"
        )
    if retrieval == "random" or replace is not None:
        if isinstance(retriever, BlindRetriever):
            raise ValmError("a blind model has no knowledge base, so its images cannot be replaced: only switched off")
        other: Any = RandomImages(retriever, seed)
        if replace is not None:
            other = FixedImages(retriever, images_in(replace, retriever.encoder.clip, options.num_images))
        model.set_retriever(other)
