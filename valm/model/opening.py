"""Options for loading models, shared by every command that loads a model."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from valm.clip.execution import CLIP_HELP
from valm.options import check_fields, option

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How models are loaded. The fields are options with a help text, and arguments of `valm.load`.

    Attributes:
        allow_download: load the CLIP that the knowledge base names, and the base that an adapter names, from the hub.
    """

    kb: str | os.PathLike | None = option("another knowledge base than the checkpoint was trained with")
    min_score: float | None = option(
        "score threshold: a token whose best image has a lower retrieval score sees no image; -1: no threshold "
        "(default: the model's own)",
        metavar="SCORE",
    )
    clip: str | None = option(CLIP_HELP)
    device: str = option("where the models run: cpu, cuda, cuda:1, ...; auto uses a GPU if torch finds one", "auto")
    allow_download: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def opened_device(self) -> torch.device:
        """The device. Raises ValmError if there is no such device."""
        from valm.clip.device import open_device

        return open_device(self.device)

    def load(self, folder: str | os.PathLike) -> tuple[Any, PreTrainedTokenizerFast]:
        """The model in `folder` and its tokenizer, as `valm.load` returns them, with `min_score` set.

        Raises:
            ValmError: as in `valm.load`, or there is no such device.
        """
        from valm.model.checkpoint import load
        from valm.retrieval.min_score import set_min_score

        model, tokenizer = load(
            folder,
            kb=self.kb,
            clip=self.clip,
            allow_download=self.allow_download,
            device=self.opened_device(),
        )
        if self.min_score is not None:
            set_min_score(model, self.min_score, folder)
        return model, tokenizer

    def load_other(self, folder: str | os.PathLike) -> tuple[Any, PreTrainedTokenizerFast]:
        """Loads a second model, with the knowledge base that its own folder names."""
        return dataclasses.replace(self, kb=None).load(folder)
