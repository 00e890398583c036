"""Controls of an evaluation: a model sees other images, or none, instead of the retrieved images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from valm.clip.read_image import read_image
from valm.errors import ValmError
from valm.knowledge_base.sources.folder import find_images
from valm.model.image_model import ImageModel
from valm.retrieval.context import ContextCache
from valm.retrieval.retriever import BlindRetriever, ImageRetriever, NoImages, Retrieved, Retriever

NamedImage: TypeAlias = tuple[str, Image.Image]
RETRIEVAL = ON, OFF, RANDOM = ("on", "off", "random")


class OtherImages:
    """A retriever that replaces the images that `retriever` finds, and keeps the scores of the replaced images."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever
        self.k, self.dim, self.kb = retriever.k, retriever.dim, retriever.kb

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        return self._replaced(self.retriever(input_ids, attention_mask))

    def start(self, batch: int) -> ContextCache:
        return self.retriever.start(batch)

    def step(self, input_ids: Tensor, state: ContextCache, attention_mask: Tensor | None = None) -> Retrieved:
        return self._replaced(self.retriever.step(input_ids, state, attention_mask))

    def _replaced(self, found: Retrieved) -> Retrieved:
        raise NotImplementedError

    def own_scores(self, input_ids: Tensor, shown: Retrieved) -> Tensor:
        """(B, T, K) float32: inner products of each token's query and the images that it sees; -inf = no image."""
        queries, index = self.retriever.encoder(input_ids), shown.image_index
        products = torch.einsum("bte,btke->btk", queries.to(shown.image_pool), shown.image_pool[index.clamp(min=0)])
        return products.masked_fill(index < 0, -torch.inf)


class Replaced(OtherImages):
    """Replaces each image's vector. vectors: (N, E), one for each image of the knowledge base."""

    def __init__(self, retriever: Retriever, vectors: Tensor):
        super().__init__(retriever)
        self.vectors = vectors

    def _replaced(self, found: Retrieved) -> Retrieved:
        return found._replace(image_pool=self.vectors[found.image_ids.cpu()].to(found.image_pool.device))


class RandomImages(OtherImages):
    """Replaces every image with a random image of the knowledge base, which depends only on the seed. `image_ids` are
    the random images' ids."""

    def __init__(self, retriever: Retriever, seed: int):
        super().__init__(retriever)
        self.other = torch.randperm(len(retriever.kb), generator=torch.Generator().manual_seed(seed))  # (N,)

    def _replaced(self, found: Retrieved) -> Retrieved:
        ids = self.other[found.image_ids.cpu()]
        pool = torch.from_numpy(self.kb.gather(ids.numpy())).to(found.image_pool)
        return found._replace(image_pool=pool, image_ids=ids.to(found.image_ids.device))


class GivenImages(OtherImages):
    """Shows every token that has images the first K of the named `images`, repeated if there are fewer. `image_ids` are
    numbers of `images`."""

    def __init__(self, retriever: Retriever, images: Sequence[NamedImage]):
        super().__init__(retriever)
        self.images = images[: self.k]
        self.vectors = retriever.encoder.clip.encode_images([image for _, image in self.images])  # (n, E)

    def _replaced(self, found: Retrieved) -> Retrieved:
        index, device = found.image_index, found.image_index.device
        none = (index < 0).all(-1, keepdim=True)  # (B, T, 1)
        slots = torch.arange(self.k, device=device) % len(self.vectors)  # (K,)
        return Retrieved(
            self.vectors.to(device),
            slots.expand(index.shape).masked_fill(none, -1),
            torch.arange(len(self.vectors), device=device),
            # a slot without an image gets the token's best score
            found.scores.where(index >= 0, found.scores.amax(-1, keepdim=True)).masked_fill(none, -torch.inf),
        )


def named_images(sources: Iterable[tuple[str, Path | BinaryIO]]) -> list[NamedImage]:
    """The images in files, with the given names. Raises ValmError if an image cannot be read."""
    images = []
    for name, source in sources:
        try:
            images.append((name, read_image(source)))
        except Exception as error:  # decoders raise many types for damaged bytes
            raise ValmError(f"cannot read the image {name}: {error}") from error
    return images


def images_fingerprint(folder: str | os.PathLike) -> str:
    """SHA-256 over the names and contents of the images under `folder`. An unreadable image counts by its name;
    `switch_images` raises if a model would see it. Raises ValmError if there are no images."""
    found = hashlib.sha256()
    for file in images_in(folder):
        found.update(os.fsencode(file.relative_to(folder)))
        with suppress(ValmError, OSError):
            found.update(file.read_bytes())
    return found.hexdigest()


def images_in(folder: str | os.PathLike) -> list[Path]:
    """The images under `folder`, sorted by name. Raises ValmError if there are no images."""
    return [Path(folder) / name for name in find_images(Path(folder))]


def images_for(
    model: ImageModel, retrieval: str = ON, *, replace: str | os.PathLike | None = None, seed: int = 0
) -> ImageRetriever | None:
    """The retriever of a control; None for a model that sees no images.

    Args:
        retrieval: "on": the images of the model's own retriever. "off": no images. "random": random images of the
            knowledge base.
        replace: a folder of images that every token with retrieved images sees instead.
        seed: random seed for the random images.

    Raises:
        ValmError: a value is invalid, or the model cannot see such images.
    """
    if retrieval not in RETRIEVAL:
        raise ValmError(f"retrieval must be one of {', '.join(RETRIEVAL)}, got {retrieval!r}")
    if replace is not None and retrieval != ON:
        raise ValmError(f"retrieval={retrieval} and images to replace it exclude each other: give only one of them")
    options = model.fusion_options
    if options.num_images == 0:
        if retrieval == RANDOM or replace is not None:
            raise ValmError("this model sees no images (K = 0), so there are none to replace")
        return None
    if retrieval == OFF:
        return NoImages(options.num_images, options.image_dim)
    retriever: Any = model.retriever
    if retriever is None:
        raise ValmError(
            f"this model sees {options.num_images} images a token, but has no retriever: give a knowledge base as kb "
            "(--kb)"
        )
    if retrieval == ON and replace is None:
        return retriever
    if isinstance(retriever, BlindRetriever):
        raise ValmError("a blind model has no knowledge base, so its images can only be switched off, not replaced")
    if replace is None:
        return RandomImages(retriever, seed)
    files = images_in(replace)[: retriever.k]
    return GivenImages(retriever, named_images((file.name, file) for file in files))


def switch_images(
    model: ImageModel, retrieval: str = ON, *, replace: str | os.PathLike | None = None, seed: int = 0
) -> None:
    """Sets which images `model` sees from now on. Arguments and errors as in `images_for`."""
    retriever = images_for(model, retrieval, replace=replace, seed=seed)
    if retriever is not None:
        model.set_retriever(retriever)
