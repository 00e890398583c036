"""Images as they are shown, and what finds them besides a model's own retriever."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from valm.files import check_regular
from valm.knowledge_base.build import build
from valm.knowledge_base.encode import Encoding
from valm.knowledge_base.images import read_image
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.retriever import Retrieved, Retriever
from valm.text import printable

THUMBNAIL_SIZE = 128  # pixels, of images that the knowledge base has no thumbnail of


class FindsImages(Protocol):
    """What finds the images of a text: a `Retriever`, or what stands in for one."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        """Images for every token (B, T)."""
        ...


@dataclass(frozen=True)
class ShownImage:
    """caption: what it shows, or where it is from; never empty. thumbnail: None where there is no picture to show."""

    caption: str
    thumbnail: Image.Image | None


class RandomImages:
    """A retriever that finds random images of the knowledge base instead of the nearest ones: the control.

    The same text has the same images for one seed; their scores are those of the token's own query.
    """

    def __init__(self, retriever: Retriever, seed: int = 0):
        self.kb = retriever.kb
        self._retriever = retriever
        self._seed = seed

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        shape = (*input_ids.shape, self._retriever.k)
        drawn = torch.randint(len(self.kb), shape, generator=torch.Generator().manual_seed(self._seed))
        ids, index = torch.unique(drawn, return_inverse=True)
        pool = torch.from_numpy(self.kb.gather(ids.numpy())).float()
        queries = self._retriever.encoder(input_ids, attention_mask).float().cpu()  # (B, T, E)
        scores = torch.einsum("bte,btke->btk", queries, pool[index])
        return Retrieved(pool, index, ids, scores)


@contextmanager
def images_of_folder(folder: Path, retriever: Retriever) -> Iterator[Retriever]:
    """A retriever that finds the images in `folder` instead of the knowledge base's, by the same queries.

    It finds as many as `retriever`, or all where the folder has fewer.

    Raises:
        ValmError: there is no readable image in the folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        encoding = Encoding(thumbnails=THUMBNAIL_SIZE, workers=0)
        kb = build(FolderSource(folder), temporary, retriever.encoder.clip, encoding, progress=False)
        yield Retriever(retriever.encoder, kb, min(retriever.k, len(kb)), cache_tokens=0)


def show_images(retriever: Any, image_ids: Sequence[int]) -> list[ShownImage]:
    """Each image with its thumbnail and caption, as far as the knowledge base of `retriever` has them."""
    kb = getattr(retriever, "kb", None)
    if not isinstance(kb, ImageKnowledgeBase):
        return [ShownImage("the token's own query" if id < 0 else f"image {id}", None) for id in image_ids]
    return [_show(kb, id) for id in image_ids]


def _show(kb: ImageKnowledgeBase, id: int) -> ShownImage:
    item = kb.item(id)
    caption = item.caption.partition("\n")[0].strip() or item.uri.strip() or f"image {id}"
    return ShownImage(printable(caption), kb.thumbnail(id) or _read(Path(item.uri)))


def _read(path: Path) -> Image.Image | None:
    """The image in a file, small; None where there is none that can be read."""
    try:
        check_regular(path)  # the knowledge base says where: a pipe, opened, would wait
        image = read_image(path)
    except Exception:  # damaged bytes make a decoder raise anything; the caption is shown then
        return None
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return image
