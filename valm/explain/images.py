"""Images for display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from valm.evaluation.controls import GivenImages
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.retriever import Retrieved
from valm.text import printable

THUMBNAIL_SIZE = 128  # pixels, of images given as files


class FindsImages(Protocol):
    """A `Retriever`, or what replaces it."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        """Retrieves the images of every token of `input_ids` (B, T)."""
        ...


@dataclass(frozen=True)
class ShownImage:
    """An image for display. caption: its first line, or else its file or number; never empty."""

    caption: str
    thumbnail: Image.Image | None


def show_images(retriever: Any, image_ids: Sequence[int]) -> list[ShownImage]:
    """The images with the thumbnails and captions that `retriever` knows."""
    if isinstance(retriever, GivenImages):
        given = [ShownImage(printable(name), _small(image)) for name, image in retriever.images]
        return [given[id] for id in image_ids]
    kb = getattr(retriever, "kb", None)
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
