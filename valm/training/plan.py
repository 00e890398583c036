"""What a training is: the options of `valm train`, which are the fields of `TrainingPlan`."""

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
from valm.text import nearest

if TYPE_CHECKING:
    from valm.corpus.texts import TextCorpus

STEPS = 1000
# Evaluations of a training, and how many without gain end it, unless the fields say otherwise.
EVALUATIONS, PATIENCE = 20, 3
# Fields of a pretrained decoder only.
BASE_FIELDS = ("layer", "unfreeze", "logit_bias", "fusion_lr", "cache_below")
TWINS = ("text", "random", "blind", "shuffled")
# Options that name a file or a folder.
PATHS = ("kb", "retrieval", "questions", "ordinary_text")
# Layers, width and heads of new models: the demo's, that of nanoGPT's example on Shakespeare, and GPT-2.
SIZES = {"tiny": "4x128x8", "small": "6x384x6", "base": "12x768x12"}


def score(text: str) -> float | str:
    return text if text == "auto" else float(text)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training is. Its fields are the options of `valm train`, which says of each what it is (`valm train
    --help`), and whose names the error messages use.

    Attributes:
        corpus: the texts to train on. With `kb` their images are retrieved as `valm retrieve` does by default, into a
            folder beside `out`. Without one, `retrieval` has them.
        fields: fields of transformers' TrainingArguments; they come before `steps`, `batch_size`, `lr` and `seed`.
        allow_download: load the CLIP from the hub that the knowledge base names.
    """

    corpus: TextCorpus | None = None
    allow_download: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retrieval: str | os.PathLike | None = option(
        "train on what `valm retrieve` wrote, without CLIP, instead of on a corpus"
    )
    out: str | os.PathLike = option("folder of the checkpoints and of the model", REQUIRED)
    resume: bool = option("resume from the newest checkpoint in --out, if any", False)
    kb: str | os.PathLike | None = option("knowledge base; without it the model sees no images")
    tokenizer: str | None = option(
        "that of a new model of a corpus without --kb: folder or Hugging Face name (default: CLIP's)"
    )
    twin: str | None = option(
        "train a control of the model with --kb instead, on the same tokens in the same order with the same seed: "
        "without images, with random ones of the knowledge base, with its retrieval query as each token's one image "
        "(Blind), or with the images of other tokens of the corpus",
        choices=TWINS,
    )
    base: str | None = option(
        "augment this pretrained decoder instead of making a new model: folder or Hugging Face name"
    )
    layer: int | None = option(
        "with --base: the layer that sees the images (default: -2, or the last that has keys of its own)"
    )
    unfreeze: str | None = option(
        "with --base: train this layer or all weights too, not the new parameters alone", choices=["block", "all"]
    )
    logit_bias: float | None = option(
        "with --base: initial bias of each head's image scores (default: -10, at which no image counts)"
    )
    score_scale: float | None = option(
        "initial value of a learned weight on the retrieval score, added to the image's attention scores; the corpus "
        "must be retrieved with scores (default: retrieval scores are not used)"
    )
    min_score: float | str | None = option(
        "a token whose best image has a lower retrieval score sees none; auto chooses what 95 in 100 captions of the "
        "knowledge base reach (default: each token but the first of a document sees images)",
        metavar="SCORE",
        parse=score,
    )
    questions: str | os.PathLike | None = option(
        "with --min-score auto, instead of the captions: texts at whose last tokens images matter; 95 in 100 of them "
        "keep theirs",
        metavar="FILE",
    )
    ordinary_text: str | os.PathLike | None = option(
        "with --min-score auto, instead: texts that need no images; 5 in 100 of their tokens see some", metavar="FILE"
    )
    fusion_lr: float | None = option("with --base: learning rate of the new parameters (default: --lr)", least=0)
    cache_below: str | os.PathLike | None = option(
        "with --base: compute what the layer reads once into this folder, which twins can share, and train from there; "
        "all below it must be frozen",
        metavar="FOLDER",
    )
    limit_softmax: bool = option(
        "compute the training loss over the tokens of the corpus and a random sample of the others in each step, which "
        "is faster where the corpus has few",
        False,
    )
    image_dropout: float = option(
        "share of the documents that train without their images, others in each pass, so that the model stays good "
        "without any; the text-only twin ignores it",
        0.0,
        least=0,
        below=1,
        metavar="SHARE",
    )
    model: str | None = option(
        f"size of a new model: {', '.join(SIZES)} (as GPT-2) or LAYERSxWIDTHxHEADS, such as 4x256x4; the last but "
        "one of its layers sees the images (default: base)",
        metavar="SIZE",
    )
    context: int = option("most tokens of a document, longer ones are cut", 512, least=1)
    steps: int | None = option("updates (default: 1000, or what --num_train_epochs says)", least=1)
    batch_size: int = option("documents a step and process", 16, least=1)
    lr: float = option("learning rate", 5e-4, least=0)
    seed: int = option("of weights, order, documents held out and dropout", 0, least=0, below=MAX_SEED)
    validation: str | os.PathLike | float | None = option(
        "text file, result of `valm retrieve`, or fraction of the documents to hold out, such as 0.01: perplexity on "
        "it at 20 steps of the training (--eval_steps), and the best checkpoint becomes the model",
        metavar="CORPUS",
        parse=str,
    )
    patience: int | None = option(
        "with --validation: stop after so many evaluations that were no better; 0: never (default: 3)", least=0
    )
    mix: float | None = option(
        "with --base and --unfreeze: share of the base's weights in the model at the end (`valm.training.mix`) "
        "(default: with --validation, that which predicts its documents best, else 0)",
        least=0,
        below=1,
        metavar="SHARE",
    )

    def check(self) -> None:
        """Checks the fields against each other; nothing is opened.

        Raises:
            ValmError: some do not go together.
        """
        if (self.corpus is None) == (self.retrieval is None):
            raise ValmError("give either a corpus or --retrieval")
        check_fields(self)
        if self.validation is None and self.patience is not None:
            raise ValmError("--patience looks at the evaluations: give --validation too")
        if self.patience and not self.training_fields()["load_best_model_at_end"]:
            raise ValmError("--patience keeps the best checkpoint: leave --load_best_model_at_end as it is, or give 0")
        if self.mix is not None and self.unfreeze is None:
            raise ValmError("--mix is of a base that trains too: give --base and --unfreeze")
        for name in BASE_FIELDS if self.base is None else ():
            if getattr(self, name) is not None:
                raise ValmError(f"--{name.replace('_', '-')} is of a pretrained decoder: give --base too")
        if self.base is not None and self.model is not None:
            raise ValmError("--model is the size of a new model: --base has its own")
        self.size()
        if self.tokenizer is not None and (self.retrieval or self.kb or self.base):
            raise ValmError(
                "--tokenizer is of a new model of a corpus without --kb: `valm retrieve` has the same option for what "
                "it writes, and --base has its own"
            )
        of_images = ("twin", "score_scale", "min_score", "questions", "ordinary_text", "logit_bias", "fusion_lr")
        given = {name: getattr(self, name) for name in of_images} | {"image_dropout": self.image_dropout or None}
        for name, value in given.items():
            if value is not None and self.kb is None:
                raise ValmError(f"--{name.replace('_', '-')} is of a model with images: give its --kb too")
        if self.score_scale is not None and self.twin in ("random", "shuffled"):
            raise ValmError(
                f"--twin {self.twin} exchanges images, and their retrieval scores are not known: give it without "
                "--score-scale"
            )
        texts = [text for text in (self.questions, self.ordinary_text) if text is not None]
        if self.min_score != "auto" and texts:
            raise ValmError("--questions and --ordinary-text choose the min_score: give --min-score auto with them")
        if len(texts) > 1:
            raise ValmError("--min-score auto chooses it from one text: give either --questions or --ordinary-text")
        if isinstance(self.min_score, str) and self.min_score != "auto":
            raise ValmError(f"--min-score must be a number or auto, got {self.min_score!r}")
        if "output_dir" in self.fields:
            raise ValmError("output_dir is the folder that --out names: leave it out")

    def check_paths(self) -> None:
        """Checks that what the fields name is there, before what takes long: the rest is read hours later.

        Raises:
            ValmError: something is not.
        """
        validation = None if self.validation is None else validation_of(self.validation)
        named: list[tuple[str, Any]] = [("--validation", validation if isinstance(validation, Path) else None)]
        named += [(f"--{name.replace('_', '-')}", getattr(self, name)) for name in PATHS]
        named += [("the corpus", file) for file in (() if self.corpus is None else self.corpus.files)]
        for name, path in named:
            if path is not None and not os.path.exists(path):
                raise ValmError(f"{name}: there is no {path}")

    def size(self) -> tuple[int, int, int]:
        """Layers, width and heads of a new model.

        Raises:
            ValmError: `model` is no size.
        """
        given = "base" if self.model is None else self.model
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", SIZES.get(given, given)):
            known = ", ".join(f"{name} ({size})" for name, size in SIZES.items())
            others = f"sizes are {known}, and LAYERSxWIDTHxHEADS such as 4x256x4"
            raise ValmError(f"--model is {given!r}{nearest(given, SIZES)}; {others}")
        layers, width, heads = map(int, SIZES.get(given, given).split("x"))
        return layers, width, heads

    def stops_after(self) -> int:
        """How many evaluations without gain end the training; 0: none do."""
        if self.validation is None or not self.training_fields()["load_best_model_at_end"]:
            return 0
        return PATIENCE if self.patience is None else self.patience

    def training_fields(self) -> dict[str, Any]:
        """The fields of TrainingArguments that are given, or follow from other fields of the plan."""
        found: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 10, "logging_first_step": True}
        if self.steps is not None or "num_train_epochs" not in self.fields:
            found["max_steps"] = STEPS if self.steps is None else self.steps
        found |= {"per_device_train_batch_size": self.batch_size, "learning_rate": self.lr, "seed": self.seed}
        found |= self.fields
        if self.validation is not None:
            # where the epochs say how many steps there are, a share of them
            default = max(1, found["max_steps"] // EVALUATIONS) if found.get("max_steps", -1) > 0 else 1 / EVALUATIONS
            steps = found.get("save_steps", found.get("eval_steps", default))
            best = {"eval_strategy": "steps", "eval_steps": steps, "save_steps": steps, "load_best_model_at_end": True}
            best |= {"per_device_eval_batch_size": found["per_device_train_batch_size"]}
            found = best | found
        return found


def validation_of(given: str | os.PathLike | float) -> float | Path:
    """The fraction or the path that `validation` of a plan means; a text may be either."""
    if isinstance(given, float):
        return given
    try:
        return float(given) if isinstance(given, str) else Path(given)
    except ValueError:
        return Path(given)
