"""`ClipPlan`, the description of a CLIP training. Its fields are the options of `valm clip train`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from valm.errors import ValmError
from valm.options import MAX_SEED, REQUIRED, check_fields, option

if TYPE_CHECKING:
    from valm.knowledge_base.sources import Source

# A model for hundreds or thousands of images, trained from scratch in minutes on two cores, as in the demo.
SMALL = "small"
STEPS, SMALL_STEPS = 1000, 300
# open_clip's limit. A CLIP of few images and texts overfits at this limit: its scale keeps growing when there is
# nothing left to learn.
MAX_LOGIT_SCALE = 100.0
SMALL_MAX_LOGIT_SCALE = 50.0
# Share of the images that the small model holds out, if that makes at least LEAST_HELD_OUT images.
SMALL_HELD_OUT, LEAST_HELD_OUT = 0.1, 10


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """Describes the training of a CLIP, for `run_clip_plan`. Its fields are the options of `valm clip train`, whose
    `--help` explains them.

    Attributes:
        images: the source of images with captions, such as a `FolderSource`.

    Example:
        >>> from valm.knowledge_base.sources.folder import FolderSource
        >>> from valm.training.clip_plan import ClipPlan
        >>> plan = ClipPlan(images=FolderSource("pictures"), model="small", out="my-clip").checked()
        >>> plan.steps, plan.max_logit_scale
        (300, 50.0)
    """

    images: Source
    model: str | None = option(
        "small, which trains from scratch on hundreds of images in minutes; an open_clip architecture; or a JSON file "
        "with its model_cfg (default: the model of --image-tower)"
    )
    image_tower: str | None = option(
        "CLIP whose image tower is copied and frozen (LiT): folder, hf-hub:ORGANISATION/MODEL or ARCHITECTURE:WEIGHTS",
        metavar="CLIP",
    )
    cache_images: bool = option(
        "run the frozen --image-tower once over every image, without random views, and train on its output", False
    )
    out: str | os.PathLike = option("folder of the CLIP, in open_clip's format; a killed training resumes", REQUIRED)
    steps: int | None = option(f"updates (default: {STEPS}; small: {SMALL_STEPS})", least=1)
    batch_size: int = option("images a step, each with one caption", 128, least=1)
    lr: float = option("highest learning rate", 1e-3, least=0)
    max_logit_scale: float | None = option(
        "limit of the learned temperature; lower it if the CLIP overfits (default: "
        f"{MAX_LOGIT_SCALE:g}; small: {SMALL_MAX_LOGIT_SCALE:g})",
        least=1,
    )
    held_out: float | None = option(
        "share of the images that is not trained on but used for the recall printed at the end (default: 0; small: "
        f"{SMALL_HELD_OUT} from {10 * LEAST_HELD_OUT} images on)",
        least=0,
        below=1,
        metavar="SHARE",
    )
    vocabulary: str | os.PathLike | None = option(
        "with --model small: text whose words also become tokens", metavar="CORPUS"
    )
    seed: int = option(
        "random seed for weights, data order, views, cut captions and --held-out", 0, least=0, below=MAX_SEED
    )
    device: str = option("cpu, or cuda (the first GPU); auto uses a GPU if torch finds one", "auto")

    @property
    def small(self) -> bool:
        return self.model == SMALL

    def checked(self) -> ClipPlan:
        """The plan with the defaults of its model. Checks the fields against each other, without opening files. Raises
        ValmError if fields contradict each other."""
        check_fields(self)
        if self.model is None and self.image_tower is None:
            raise ValmError("give --model, --image-tower, or both")
        if self.cache_images and self.image_tower is None:
            raise ValmError("--cache-images needs a frozen image tower: give --image-tower, or leave it out")
        if self.vocabulary is not None and not self.small:
            raise ValmError("--vocabulary is for --model small: other models use all of CLIP's tokens")
        steps, scale = (SMALL_STEPS, SMALL_MAX_LOGIT_SCALE) if self.small else (STEPS, MAX_LOGIT_SCALE)
        return dataclasses.replace(self, steps=self.steps or steps, max_logit_scale=self.max_logit_scale or scale)
