"""`TrainingPlan`, the description of a training. Its fields are the options of `valm train`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.errors import ValmError
from valm.options import MAX_SEED, REQUIRED, check_fields, option
from valm.store.parts import base_of
from valm.text import nearest

if TYPE_CHECKING:
    from valm.corpus.texts import TextCorpus

STEPS = 1000
# Default learning rate of a new model; and with a base, of what sees the images, and the initial bias of its scores.
LR, BASE_LR, BASE_LOGIT_BIAS = 5e-4, 2e-3, 0.0
# With a base: default weight of the divergence from it (studies/color/plan.md, 3 December 2026).
BASE_KL = 1.0
# A `min_score` that hides no image.
NO_MIN_SCORE = -1.0
# Default number of evaluations in a training, and how many evaluations without improvement end it.
EVALUATIONS, PATIENCE = 20, 3
# The fields that need another field, and what they are for.
NEEDS = {
    "base": ("a pretrained decoder", ("layer", "base_kl", "logit_bias", "cache_below")),
    "kb": ("a model with images", ("twin", "min_score", "questions", "ordinary_text")),
}
TWINS = ("text", "random", "blind", "shuffled")
# Options that name a file or a folder.
PATHS = ("kb", "retrieval", "questions", "ordinary_text")
# Layers, width and heads of new models: the demo's model, nanoGPT's Shakespeare example, and GPT-2.
SIZES = {"tiny": "4x128x8", "small": "6x384x6", "base": "12x768x12"}


def score(text: str) -> float | str:
    return text if text == "auto" else float(text)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Describes a training, for `run_plan`. Its fields are the options of `valm train`, whose `--help` explains them.
    Errors use the options' names.

    Attributes:
        corpus: the texts to train on. If `kb` is given, their images are retrieved as by `valm retrieve`, into a folder
            next to `out`. Give either `corpus` or `retrieval`.
        allow_download: load the CLIP from the hub that the knowledge base names.
        fields: fields of transformers' TrainingArguments. They override `steps`, `batch_size`, `lr` and `seed`.

    Example:
        >>> from valm.corpus.texts import TextCorpus
        >>> from valm.training import TrainingPlan
        >>> plan = TrainingPlan(corpus=TextCorpus(["corpus.txt"]), kb="kb", model="tiny", out="trained")
        >>> plan.size()  # layers, width, heads
        (4, 128, 8)
    """

    corpus: TextCorpus | None = None
    allow_download: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retrieval: str | os.PathLike | None = option("train on what `valm retrieve` wrote, instead of on a corpus")
    out: str | os.PathLike = option("folder of the checkpoints and of the model", REQUIRED)
    resume: bool = option("resume from the newest checkpoint in --out, if any", False)
    kb: str | os.PathLike | None = option("knowledge base; without it the model sees no images")
    tokenizer: str | None = option(
        "tokenizer of a new text-only model (without --kb): folder or Hugging Face name (default: CLIP's)"
    )
    twin: str | None = option(
        "train a control instead of the model with --kb, on the same tokens in the same order with the same seed: "
        "text, without images (with --base, the base itself is this control); random, with random images of the "
        "knowledge base; blind, with each token's retrieval query instead of its image; shuffled, with the images of "
        "other tokens of the corpus",
        choices=TWINS,
    )
    base: str | None = option(
        "add images to this pretrained decoder, whose weights are frozen, instead of making a new model: folder or "
        "Hugging Face name"
    )
    layer: int | None = option(
        "with --base: the layer that sees the images (default: -2, or the last layer that computes its own keys)"
    )
    base_kl: float | None = option(
        f"with --base: weight of the Kullback-Leibler divergence from the base in the training loss, which keeps text "
        f"without pictures nearly as the base predicts it; 0: cross entropy alone (default: {BASE_KL:g})",
        least=0,
        metavar="WEIGHT",
    )
    logit_bias: float | None = option(
        f"with --base: initial bias of each head's image scores (default: {BASE_LOGIT_BIAS:g}; at -10 images have "
        "almost no weight)"
    )
    min_score: float | str | None = option(
        "score threshold: a token whose best image has a lower retrieval score sees no image; auto: the threshold that "
        "95 in 100 captions of the knowledge base reach, which loads CLIP; -1: no threshold (default: with --base auto "
        "or, if the retrieval has no scores or the knowledge base fewer than 20 captions, none; without --base none)",
        metavar="SCORE",
        parse=score,
    )
    questions: str | os.PathLike | None = option(
        "with --min-score auto: texts whose last tokens need images; 95 in 100 reach the threshold (default: captions "
        "of the knowledge base)",
        metavar="FILE",
    )
    ordinary_text: str | os.PathLike | None = option(
        "with --min-score auto: texts that need no images; 5 in 100 of their tokens reach the threshold",
        metavar="FILE",
    )
    cache_below: str | os.PathLike | None = option(
        "with --base: compute the input of the fusion layer once into this folder, which controls can share, and train "
        "from there",
        metavar="FOLDER",
    )
    limit_softmax: bool = option(
        "compute the training loss over the tokens of the corpus and a random sample of the others in each step; "
        "faster if the corpus contains few different tokens",
        False,
    )
    model: str | None = option(
        f"size of a new model: {', '.join(SIZES)} (as GPT-2) or LAYERSxWIDTHxHEADS, such as 4x256x4; its "
        "second-to-last layer sees the images (default: base)",
        metavar="SIZE",
    )
    context: int = option("maximum tokens of a document; longer documents are cut", 512, least=1)
    steps: int | None = option("updates (default: 1000, or as --num_train_epochs determines)", least=1)
    batch_size: int = option("documents a step and process", 16, least=1)
    lr: float | None = option(f"learning rate (default: {LR:g}; with --base {BASE_LR:g})", least=0)
    seed: int = option("random seed for weights, data order, validation split and dropout", 0, least=0, below=MAX_SEED)
    validation: str | os.PathLike | float | None = option(
        "text file, result of `valm retrieve`, or fraction of the documents to hold out, such as 0.01; its perplexity "
        "is measured 20 times (--eval_steps), and the best checkpoint becomes the model",
        metavar="CORPUS",
        parse=str,
    )
    patience: int | None = option(
        "with --validation: stop after this many evaluations without improvement; 0: never (default: 3)", least=0
    )

    def check(self) -> None:
        """Checks the fields against each other, without opening files. Raises ValmError if fields contradict each
        other."""
        if (self.corpus is None) == (self.retrieval is None):
            raise ValmError("give either a corpus or --retrieval")
        check_fields(self)
        if self.validation is None and self.patience is not None:
            raise ValmError("--patience counts evaluations: give --validation too")
        if self.patience and not self.training_fields()["load_best_model_at_end"]:
            raise ValmError("--patience needs the best checkpoint: leave --load_best_model_at_end out, or give 0")
        for needed, (what, names) in NEEDS.items():
            for name in names if getattr(self, needed) is None else ():
                if getattr(self, name) is not None:
                    raise ValmError(f"--{name.replace('_', '-')} is for {what}: give --{needed} too")
        if self.base is not None and (self.kb is None or self.twin == "text"):
            raise ValmError(
                "--base trains only what sees images, so without images nothing trains, and the base itself is the "
                "text-only baseline: give --kb, and leave --twin text out"
            )
        if self.base is not None and self.model is not None:
            raise ValmError("--model is the size of a new model, but --base has its own: leave --model out")
        self.size()
        if self.tokenizer is not None and (self.retrieval or self.kb):
            raise ValmError(
                "--tokenizer is for a new text-only model: --base has its own tokenizer, and for a model with images, "
                "give --tokenizer to `valm retrieve`"
            )
        texts = [text for text in (self.questions, self.ordinary_text) if text is not None]
        if texts and self.min_score != "auto" and (self.base is None or self.min_score is not None):
            raise ValmError("--questions and --ordinary-text choose the score threshold: give --min-score auto too")
        if len(texts) > 1:
            raise ValmError("--min-score auto uses one kind of text: give either --questions or --ordinary-text")
        if isinstance(self.min_score, str) and self.min_score != "auto":
            raise ValmError(f"--min-score must be a number or auto, got {self.min_score!r}")
        if "output_dir" in self.fields:
            raise ValmError("--out sets output_dir: leave output_dir out")

    def check_paths(self) -> None:
        """Checks that all files and folders of the fields exist; some are opened only hours later. Raises ValmError if
        a file or folder is missing."""
        if self.base is not None and (base := base_of(self.base)) is not None:
            raise ValmError(f"--base {self.base} sees pictures already: give a decoder, such as its {base}")
        validation = None if self.validation is None else validation_of(self.validation)
        named: list[tuple[str, Any]] = [("--validation", validation if isinstance(validation, Path) else None)]
        named += [(f"--{name.replace('_', '-')}", getattr(self, name)) for name in PATHS]
        named += [("the corpus", file) for file in (() if self.corpus is None else self.corpus.files)]
        for name, path in named:
            if path is not None and not os.path.exists(path):
                raise ValmError(f"{name}: there is no {path}")

    def size(self) -> tuple[int, int, int]:
        """Layers, width and heads of a new model. Raises ValmError if `model` is not a size."""
        given = "base" if self.model is None else self.model
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", SIZES.get(given, given)):
            known = ", ".join(f"{name} ({size})" for name, size in SIZES.items())
            others = f"sizes are {known}, and LAYERSxWIDTHxHEADS such as 4x256x4"
            raise ValmError(f"--model is {given!r}{nearest(given, SIZES)}; {others}")
        layers, width, heads = map(int, SIZES.get(given, given).split("x"))
        return layers, width, heads

    def learning_rate(self) -> float:
        """`lr` or its default."""
        default = LR if self.base is None else BASE_LR
        return default if self.lr is None else self.lr

    def methods(self) -> dict[str, Any]:
        """The methods of `trainer`, with their defaults."""
        base_kl = BASE_KL if self.base_kl is None and self.base is not None else self.base_kl
        return {"cache_below": self.cache_below, "base_kl": base_kl, "limit_softmax": self.limit_softmax}

    def stops_after(self) -> int:
        """How many evaluations without improvement end the training; 0: training never stops early."""
        if self.validation is None or not self.training_fields()["load_best_model_at_end"]:
            return 0
        return PATIENCE if self.patience is None else self.patience

    def training_fields(self) -> dict[str, Any]:
        """The fields of TrainingArguments that are given or follow from other fields of the plan."""
        found: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 10, "logging_first_step": True}
        if self.steps is not None or "num_train_epochs" not in self.fields:
            found["max_steps"] = STEPS if self.steps is None else self.steps
        found |= {
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate(),
            "seed": self.seed,
        }
        found |= self.fields
        if self.validation is not None:
            # a share of the steps if the epochs determine their number
            default = max(1, found["max_steps"] // EVALUATIONS) if found.get("max_steps", -1) > 0 else 1 / EVALUATIONS
            steps = found.get("save_steps", found.get("eval_steps", default))
            best = {"eval_strategy": "steps", "eval_steps": steps, "save_steps": steps, "load_best_model_at_end": True}
            best |= {"per_device_eval_batch_size": found["per_device_train_batch_size"]}
            found = best | found
        return found


def validation_of(given: str | os.PathLike | float) -> float | Path:
    """The fraction or the path in a plan's `validation`; a string may be either."""
    if isinstance(given, float):
        return given
    try:
        return float(given) if isinstance(given, str) else Path(given)
    except ValueError:
        return Path(given)
