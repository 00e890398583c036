"""The configuration of VaLM: that of GPT-2 and the image options."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import GPT2Config

from valm.errors import ValmError
from valm.model.config_file import MODEL_TYPE, NO_WEIGHTS, WEIGHTS_KEY, reads_images
from valm.text import nearest
from valm_kernels import MAX_IMAGES

FUSION_SCALES = ("head_dim", "embed_dim")


def check_images(image_dim: int, num_images: int, blind: bool, min_score: float | None) -> None:
    """Checks which images a model takes: options of `ValmConfig` and of `FusionOptions`.

    Raises:
        ValmError: one has an invalid value, or they exclude each other.
    """
    if image_dim < 1:
        raise ValmError(f"image_dim must be at least 1, got {image_dim}")
    if not 0 <= num_images <= MAX_IMAGES:
        raise ValmError(f"num_images must be from 0 to {MAX_IMAGES}, got {num_images}")
    if blind and num_images != 1:
        raise ValmError(f"blind needs num_images = 1 (the query is the one image), got {num_images}")
    check_min_score(min_score, num_images, blind)


def check_score_scale(name: str, value: float | None, num_images: int) -> None:
    """Checks the initial scale of retrieval scores, the option `name`; None = they are not used.

    Raises:
        ValmError: it is not finite, or the model sees no images.
    """
    if value is None:
        return
    _check_finite(name, value)
    if num_images == 0:
        raise ValmError(f"{name} scales the scores of images, but with num_images = 0 there are none: set it to None")


def check_min_score(value: float | None, num_images: int, blind: bool) -> None:
    """Checks `min_score`; None = no cut.

    Raises:
        ValmError: it is not finite, or the model retrieves no images.
    """
    if value is None:
        return
    _check_finite("min_score", value)
    if num_images == 0 or blind:
        raise ValmError(
            f"min_score is of retrieved images, got num_images = {num_images}, blind = {blind}: set it to None"
        )


def _check_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValmError(f"{name} must be a finite number or None, got {value!r}")


class ValmConfig(GPT2Config):
    """GPT-2 with one block that also attends to retrieved images (Wang et al. 2022, section 2.3).

    Takes every argument of `GPT2Config` and, as keywords:

    Args:
        image_dim: dimension E of an image vector. When it is not the model's width, one input projection is added.
        num_images: K, the images per token. 0 is the baseline GPT-2*: a GPT-2 without any image parameters.
        fusion_layer: index of the fusion layer, negative from the end; the paper puts it last but one.
        fusion_scale: "head_dim" scales scores in the fusion layer by 1/sqrt(head_dim), as in every other block;
            "embed_dim" by 1/sqrt(n_embd), as the published code does (3.5 times flatter with 12 heads).
        blind: each token sees its own retrieval query as its one "image" and nothing is searched
            (Blind-VaLM, Ontalvilla et al. 2024). Needs num_images = 1.
        image_logit_bias_init: initial value of the bias that each head adds to its image scores. 0 as published;
            -10 starts with the images closed.
        image_score_scale_init: initial value of a learned weight on the retrieval score, one for all heads, added to
            the image's attention scores. None as published: retrieval scores are not used.
        min_score: a token whose best image has a lower retrieval score sees none (`valm.retrieval.min_score`). None as
            published: every token but the first of a document sees K.

    Raises:
        ValmError: there is no such argument, or it has an invalid value.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        image_dim: int = 768,
        num_images: int = 4,
        fusion_layer: int = -2,
        fusion_scale: str = "head_dim",
        blind: bool = False,
        image_logit_bias_init: float = 0.0,
        image_score_scale_init: float | None = None,
        min_score: float | None = None,
        **kwargs: Any,
    ):
        # as files and `to_dict` have it, with names that are those of another version of transformers
        if "transformers_version" not in kwargs:
            self.check_names(kwargs)
        super().__init__(**kwargs)
        self.image_dim = image_dim
        self.num_images = num_images
        self.fusion_layer = fusion_layer
        self.fusion_scale = fusion_scale
        self.blind = blind
        self.image_logit_bias_init = image_logit_bias_init
        self.image_score_scale_init = image_score_scale_init
        self.min_score = min_score
        check_images(image_dim, num_images, blind, min_score)
        check_score_scale("image_score_scale_init", image_score_scale_init, num_images)
        if not -self.n_layer <= fusion_layer < self.n_layer:
            raise ValmError(f"fusion_layer must name one of the {self.n_layer} blocks, got {fusion_layer}")
        if fusion_scale not in FUSION_SCALES:
            raise ValmError(f"fusion_scale must be one of {FUSION_SCALES}, got {fusion_scale!r}")
        if self.add_cross_attention:
            raise ValmError("add_cross_attention must be False: VaLM is a decoder without an encoder")
        if self.n_embd % self.n_head or not 8 <= self.n_embd // self.n_head <= 256:
            raise ValmError(
                f"n_embd must be n_head times a head dimension from 8 to 256, got {self.n_embd} and {self.n_head} heads"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """`PreTrainedConfig.from_dict`.

        Raises:
            ValmError: it is the config of an augmented decoder (`valm.augment`), which AutoConfig opens.
        """
        if "base_config" in config_dict:
            raise ValmError("this is the config of an augmented decoder: open it by AutoConfig")
        entries = {key: config_dict[key] for key in config_dict if key != WEIGHTS_KEY}
        return super().from_dict({"transformers_version": None} | entries, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Checks names of arguments: transformers takes any name, and a misspelt one would change nothing.

        Raises:
            ValmError: there is no such argument.
        """
        known = {*inspect.signature(cls).parameters, *(field.name for field in fields(cls)), *cls.attribute_map}
        known |= {"attn_implementation", "experts_implementation"}  # which PreTrainedConfig takes out of **kwargs
        for name in names:
            if name not in known and not hasattr(cls, name):  # a property, such as num_labels
                raise ValmError(f"ValmConfig has no argument {name}{nearest(name, known)}")

    def to_diff_dict(self) -> dict[str, Any]:
        found = super().to_diff_dict()
        return found | {WEIGHTS_KEY: NO_WEIGHTS} if self.num_images > 0 else found

    @property
    def transformers_weights(self) -> str | None:
        """What `from_pretrained` of any class looks for: none but that of a VaLM finds the weights."""
        return None if self.num_images == 0 or reads_images.get() else NO_WEIGHTS

    @property
    def fusion_index(self) -> int:
        """Index of the fusion layer, counted from the first block."""
        return self.fusion_layer % self.n_layer
