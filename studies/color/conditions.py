"""The images that the tokens of a model see in an evaluation: retrieved images, replacements, or no images."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.color.config import DOSES, KB, KB_OTHERS
from studies.color.pictures import Picture, shows
from studies.demo.questions import swapped_red_and_blue
from valm.clip.clip import Clip
from valm.evaluation.controls import RandomImages, Replaced
from valm.evaluation.questions import COLORS
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever


class Conditions:
    """The retrievers of one seed, each made on first use.

    Args:
        folder: folder of the seed, with its knowledge bases.
        clip: the CLIP that the knowledge bases were built with.
        tokenizer: the language model's.
        images: K, images per token.
        pictures: all pictures of the study.
        folder_of_pictures: folder of their files.
    """

    def __init__(
        self,
        folder: Path,
        clip: Clip,
        tokenizer: Any,
        images: int,
        seed: int,
        pictures: Sequence[Picture],
        folder_of_pictures: Path,
    ):
        self.folder, self.images, self.seed = folder, images, seed
        self.encoder = ContextEncoder(clip, tokenizer=tokenizer)
        self._pictures = {picture.file: picture for picture in pictures}
        self._colors = other_colors(seed)
        self._makers: dict[str, Callable[[], Any]] = {
            "retrieved": lambda: Retriever(self.encoder, self.kb, images),
            "taken-out": lambda: self._of(KB_OTHERS),
            "random": lambda: RandomImages(self["retrieved"], seed),
            "exchanged": lambda: Replaced(self["retrieved"], swapped_red_and_blue(self.kb, folder_of_pictures, clip)),
            "other-colors": lambda: Replaced(self["retrieved"], self._other_vectors()),
        } | {dose: partial(self._of, f"{KB}-{dose}") for dose in DOSES}
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def _of(self, kb: str) -> Retriever:
        return Retriever(self.encoder, ImageKnowledgeBase.open(self.folder / kb), self.images)

    @cached_property
    def blind(self) -> BlindRetriever:
        """The retriever of the query control, which sees its own query at the tokens that would see images."""
        return BlindRetriever(self.encoder, kb=self.kb)

    @cached_property
    def kb(self) -> ImageKnowledgeBase:
        return ImageKnowledgeBase.open(self.folder / KB)

    @cached_property
    def shown(self) -> list[Picture]:
        """The picture of each image of the knowledge base."""
        return [self._pictures[self.kb.item(id).uri] for id in range(len(self.kb))]

    def pictures_of(self, item: str) -> list[Picture]:
        """The pictures in the knowledge base that show an item."""
        return [
            picture for of_caption in self._by_caption.values() if shows(of_caption[0], item) for picture in of_caption
        ]

    @cached_property
    def _by_caption(self) -> dict[str, list[Picture]]:
        found: dict[str, list[Picture]] = {}
        for picture in self.shown:
            found.setdefault(picture.caption, []).append(picture)
        return found

    def colors_of(self, item: str) -> dict[str, str | None]:
        """The most frequent colour word of an item's pictures, for the original pictures and for each of EXCHANGES.

        None if no picture shows the item, or if no colour prevails.
        """
        own = self.pictures_of(item)
        color = commonest(picture.color for picture in own)
        return {
            "retrieved": color,
            "exchanged": commonest(picture.exchanged_color for picture in own),
            # if no image has the other colour, the item's own images are shown
            "other-colors": self._colors[color] if color and self._colors.get(color) in self._of_color else None,
        }

    @cached_property
    def _of_color(self) -> dict[str, list[int]]:
        """The images of each colour."""
        found: dict[str, list[int]] = {}
        for id, picture in enumerate(self.shown):
            if picture.color is not None:
                found.setdefault(picture.color, []).append(id)
        return found

    def _other_vectors(self) -> Tensor:
        """(N, E): the vector of a random image of another colour, or the image's own vector if it has no colour."""
        draw = random.Random(self.seed)
        instead = []
        for id, picture in enumerate(self.shown):
            others = [] if picture.color is None else self._of_color.get(self._colors.get(picture.color, ""), [])
            instead.append(draw.choice(others) if others else id)
        return torch.from_numpy(self.kb.gather(np.array(instead))).float()


def other_colors(seed: int) -> dict[str, str]:
    """Another colour for each of COLORS: one cycle through all colours, so that no colour maps to itself."""
    cycle = list(COLORS)
    random.Random(seed).shuffle(cycle)
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def commonest(colors: Iterable[str | None]) -> str | None:
    """The most frequent colour word, in a tie the earlier word. None if there is no colour word."""
    counts = Counter(color for color in colors if color is not None)
    return counts.most_common(1)[0][0] if counts else None
