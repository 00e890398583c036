"""The comparisons on the study's page: pairs of arms and measures, and the format of their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from studies.color.config import ARMS, COLORED_CAPTIONS, EXCHANGES, VALIDATION
from studies.color.results import (
    APART,
    CALIBRATED,
    NATS,
    PEOPLE,
    RAW,
    SHOWN,
    ArmTest,
    Found,
    Keep,
    Results,
    every,
    pictured,
    pixels_agree,
    unpictured,
)
from valm.evaluation.sets import SETS

BASE, VALM, CONTROL, RANDOM = ("base", "none"), ("valm", "retrieved"), ("control", "retrieved"), ("random", "random")
PROMPT = ("base", COLORED_CAPTIONS)
PRIMARY, VICOMTE = "memory_color", "vicomte_color"
# What VaLM is compared with.
OTHERS = {"base model": BASE, "query control": CONTROL, "random images": RANDOM, "colours in the prompt": PROMPT}
EXCHANGE_TITLES = dict(
    zip(
        EXCHANGES, ("same pictures, red and blue exchanged", "pictures of other objects in another colour"), strict=True
    )
)
# The titles of measures in tables; results files have their keys.
MEASURES = {
    RAW: "uncalibrated",
    CALIBRATED: "calibrated",
    APART: "calibrated within this group",
    SHOWN: "answers with the pictures' colour",
}
# "No difference" needs an interval within so many points of 0.
EQUAL = 0.03


class Items(NamedTuple):
    """Some items of a set, with a title for tables. calibrated: how `answers` calibrates their answers."""

    title: str
    of: str
    keep: Keep = every
    calibrated: str = CALIBRATED


VALIDATION_OBJECTS = Items("validation objects", VALIDATION)
WITH_PICTURE = Items("MemoryColor, objects with a picture", PRIMARY, pictured, APART)
WITHOUT_PICTURE = Items("MemoryColor, objects without a picture", PRIMARY, unpictured, APART)
ALL_OF_PEOPLE = Items("MemoryColor and ColorTerms", PEOPLE)
ALL_OF_PRIMARY, ALL_OF_VICOMTE = Items("MemoryColor", PRIMARY), Items("ViComTe colour", VICOMTE)
COLOR_TERMS = Items("ColorTerms", "color_terms")


def with_and_without(items: Items) -> tuple[Items, Items]:
    """The items that have a picture and those that have none."""
    parts = {"with": pictured, "without": unpictured}
    with_picture, without = (
        items._replace(title=f"{items.title}, objects {which} a picture", keep=keep) for which, keep in parts.items()
    )
    return with_picture, without


SECONDARY = (
    ALL_OF_PRIMARY,
    WITH_PICTURE,
    Items("MemoryColor, objects whose pictures show the right colour", PRIMARY, pixels_agree),
    WITHOUT_PICTURE,
    ALL_OF_PEOPLE,
    *with_and_without(ALL_OF_PEOPLE),
    COLOR_TERMS,
    *with_and_without(COLOR_TERMS),
    ALL_OF_VICOMTE,
    VALIDATION_OBJECTS,
)


def follows(results: Results, items: Items, exchange: str) -> Found | None:
    """How much more often VaLM answers the exchanged colour with exchanged images than with the original ones. No model
    without a knowledge base can do so."""
    return results.difference((VALM[0], exchange), VALM, items.of, exchange, items.keep)


def learned(results: Results, items: Items) -> Found | None:
    """VaLM minus the query control, uncalibrated: the mean over the trainings of the curve. None without a curve."""
    pairs = list(zip(results.curve(VALM[0]).values(), results.curve(CONTROL[0]).values(), strict=True))
    return results.mean_difference(pairs, items.of, RAW, items.keep) if pairs else None


def perplexity_ratio(results: Results, arm: ArmTest, over: ArmTest, text: str) -> Found | None:
    """Perplexity of `arm` on a text ÷ perplexity of `over`. None if both are the same arm, or if no seed has both."""
    nats = None if arm == over else results.difference(arm, over, text, NATS)
    return nats and nats._replace(value=math.exp(nats.value), low=math.exp(nats.low), high=math.exp(nats.high))


def verdict(found: Found) -> str:
    """What an interval says: "more", "less", "no difference", or that it includes 0."""
    if found.low > 0:
        return "more"
    if found.high < 0:
        return "less"
    return "no difference" if max(-found.low, found.high) < EQUAL else "includes 0"


def signed(value: float) -> str:
    """A difference in points, with a second decimal if one would hide its sign."""
    digits = 2 if 0 < abs(100 * value) < 0.05 else 1
    return f"{100 * value:+.{digits}f}".replace("-", "−")


def points(found: Found) -> str:
    return f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"


def decided(found: Found) -> str:
    return f"{points(found)}, {verdict(found)}"


def times(found: Found) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def raw_and_calibrated(results: Results, arm: ArmTest, items: Items) -> str:
    """Both accuracies in percent."""
    found = [results.accuracy(arm, items.of, measure, items.keep) for measure in (RAW, items.calibrated)]
    return "–" if None in found else " / ".join(f"{100 * one.value:.1f}" for one in found if one is not None)


def cell(found: Found | None, form: Callable[[Found], str], results: Results) -> str:
    """A number in a table of `results`, followed by its seeds if some seeds lack it."""
    if found is None:
        return "–"
    fewer = len(found.seeds) < len(results.numbers)
    return form(found) + (f" (seeds {', '.join(map(str, found.seeds))})" if fewer else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in lines)


def set_title(of: str) -> str:
    named = {one.of: one.title for one in (ALL_OF_PEOPLE, VALIDATION_OBJECTS)}
    return named[of] if of in named else SETS[of].title


def arm_title(arm: ArmTest) -> str:
    return "base model, colours in its prompt" if arm == PROMPT else ARMS[arm[0]].title
