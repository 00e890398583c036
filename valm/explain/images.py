"""Images for display, and retrievers besides a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from valm.evaluation import controls
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.retriever import Retrieved, Retriever
from valm.text import printable

THUMBNAIL_SIZE = 128  # pixels, of images given as files


class FindsImages(Protocol):
    """Finds the images of a text: a `Retriever`, or a replacement."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        """Images for every token (B, T)."""
        ...


@dataclass(frozen=True)
class ShownImage:
    """caption: what it shows, or where it is from; never empty. thumbnail: None if there is none."""

    caption: str
    thumbnail: Image.Image | None


class ShownRandomImages(controls.RandomImages):
    """The control `RandomImages`, with the ids of the images that the model sees, and their own scores unless `scored`:
    a model that uses retrieval scores gets those of the control."""

    def __init__(self, retriever: Retriever, seed: int, *, scored: bool):
        super().__init__(retriever, seed)
        self.scored = scored

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        found = self.retriever(input_ids, attention_mask)
        ids = self.other[found.image_ids.cpu()]
        pool = torch.from_numpy(self.retriever.kb.gather(ids.numpy())).to(found.image_pool)
        scores = found.scores
        if not self.scored:
            scores = _scores(self.retriever.encoder(input_ids, attention_mask), pool, found.image_index)
        return Retrieved(pool, found.image_index, ids, scores)


class GivenImages(controls.FixedImages):
    """A retriever that returns images from files, the same for every token that has some, instead of the knowledge
    base's.

    Args:
        files: at least one; the first K are used, repeated if there are fewer.
        scored: the model uses retrieval scores, and gets those of the control `FixedImages`; otherwise they are the
            images' own.

    Raises:
        ValmError: a file cannot be read as an image.
    """

    def __init__(self, files: Sequence[Path], retriever: Retriever, *, scored: bool):
        images = controls.read_images(files[: retriever.k])
        super().__init__(retriever, retriever.encoder.clip.encode_images(images))
        self.scored = scored
        self.images = [
            ShownImage(printable(file.name), _small(image)) for file, image in zip(files, images, strict=False)
        ]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        found = super().__call__(input_ids, attention_mask)
        found = found._replace(image_ids=torch.arange(len(self.images)))
        if self.scored:
            return found
        queries = self.retriever.encoder(input_ids, attention_mask)
        return found._replace(scores=_scores(queries, found.image_pool, found.image_index))


def _scores(queries: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """(B, T, K): inner products of queries (B, T, E) and images (U, E) at `index` (B, T, K); -inf = none."""
    products = torch.einsum("bte,btke->btk", queries.to(pool), pool[index.clamp(min=0)])
    return products.masked_fill(index < 0, -torch.inf)


def show_images(retriever: Any, image_ids: Sequence[int]) -> list[ShownImage]:
    """Each image with its thumbnail and caption, as far as `retriever` knows them."""
    if isinstance(retriever, GivenImages):
        return [retriever.images[id] for id in image_ids]
    kb = getattr(retriever.retriever if isinstance(retriever, ShownRandomImages) else retriever, "kb", None)
    if not isinstance(kb, ImageKnowledgeBase):
        return [ShownImage("the token's own query" if id < 0 else f"image {id}", None) for id in image_ids]
    return [_show(kb, id) for id in image_ids]


def _show(kb: ImageKnowledgeBase, id: int) -> ShownImage:
    item = kb.item(id)
    caption = item.caption.partition("\n")[0].strip() or item.uri.strip() or f"image {id}"
    return ShownImage(printable(caption), kb.thumbnail(id))


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return small
