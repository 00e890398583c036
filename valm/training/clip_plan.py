"""What the training of a CLIP is: the options of `valm clip train`, which are the fields of `ClipPlan`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from valm.errors import ValmError
from valm.options import MAX_SEED, REQUIRED, check_fields, option

if TYPE_CHECKING:
    from valm.knowledge_base.sources import Source

# The model for hundreds or thousands of images: trained from scratch in minutes on two cores, as in the demo.
SMALL = "small"
STEPS, SMALL_STEPS = 1000, 300
# The limit of open_clip. A CLIP of few images and texts overfits with it: its scale keeps growing when there is nothing
# left to learn.
MAX_LOGIT_SCALE = 100.0
SMALL_MAX_LOGIT_SCALE = 50.0
# Share of the images that small holds out, if that makes so many.
SMALL_HELD_OUT, LEAST_HELD_OUT = 0.1, 10


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """What the training of a CLIP is. Its fields are the options of `valm clip train`, whose names the errors use.

    Attributes:
        images: with captions.
    """

    images: Source
    model: str | None = option(
        "small, which trains from scratch on hundreds of images in minutes; an architecture of open_clip's; or a JSON "
        "file with its model_cfg (default: that of --image-tower)"
    )
    image_tower: str | None = option(
        "CLIP whose image side is taken over and frozen (LiT): folder, hf-hub:ORGANISATION/MODEL or "
        "ARCHITECTURE:WEIGHTS",
        metavar="CLIP",
    )
    cache_images: bool = option(
        "run the frozen --image-tower once over every image, without random views, and train on what it returns", False
    )
    out: str | os.PathLike = option("folder of the CLIP, in open_clip's format; a killed training resumes", REQUIRED)
    steps: int | None = option(f"updates (default: {STEPS}; small: {SMALL_STEPS})", least=1)
    batch_size: int = option("images a step, each with one caption", 128, least=1)
    lr: float = option("learning rate at its highest", 1e-3, least=0)
    max_logit_scale: float | None = option(
        "limit of the learned temperature: lower where few images are overfitted (default: "
        f"{MAX_LOGIT_SCALE:g}; small: {SMALL_MAX_LOGIT_SCALE:g})",
        least=1,
    )
    held_out: float | None = option(
        "share of the images that is not trained on, for the recall printed at the end (default: 0; small: "
        f"{SMALL_HELD_OUT} from {10 * LEAST_HELD_OUT} images on)",
        least=0,
        below=1,
        metavar="SHARE",
    )
    vocabulary: str | os.PathLike | None = option(
        "with --model small: text whose words become tokens too, beside those of the captions", metavar="CORPUS"
    )
    seed: int = option("of weights, order, views, cut captions and --held-out", 0, least=0, below=MAX_SEED)
    device: str = option("where it trains: cpu, or cuda, the first GPU; auto takes a GPU where torch has one", "auto")

    @property
    def small(self) -> bool:
        return self.model == SMALL

    def checked(self) -> ClipPlan:
        """The plan with the defaults of its model. Checks the fields against each other; nothing is opened.

        Raises:
            ValmError: some do not go together.
        """
        check_fields(self)
        if self.model is None and self.image_tower is None:
            raise ValmError("give --model, --image-tower, or both")
        if self.cache_images and self.image_tower is None:
            raise ValmError("--cache-images is for a frozen image tower: give --image-tower, or train without it")
        if self.vocabulary is not None and not self.small:
            raise ValmError("--vocabulary is for --model small: others read with all of CLIP's tokens")
        steps, scale = (SMALL_STEPS, SMALL_MAX_LOGIT_SCALE) if self.small else (STEPS, MAX_LOGIT_SCALE)
        return dataclasses.replace(self, steps=self.steps or steps, max_logit_scale=self.max_logit_scale or scale)
