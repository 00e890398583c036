"""What the study's page compares: pairs of arms and measures, and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from studies.color.config import ARMS, EXCHANGES, VALIDATION
from studies.color.results import CALIBRATED, NATS, RAW, ArmTest, Found, Results, pictured
from valm.evaluation.sets import SETS

VALM, TWIN, BLIND = ("valm", "retrieved"), ("twin", "none"), ("blind", "retrieved")
BASE, CUT, CUT_RANDOM = ("base", "none"), ("valm", "cut"), ("valm", "cut-random")
COLORLESS, COLORLESS_BLIND = ("colorless-valm", "retrieved"), ("colorless-blind", "retrieved")
PRIMARY, SECONDARY = "memory_color", ("color_terms", "vicomte_color")
# (set, measure) in the order of the plan: the primary measure, then the secondary ones.
MEASURES = (
    *((of, measure) for of in (PRIMARY, *SECONDARY) for measure in (RAW, CALIBRATED)),
    ("object_shape", RAW),
    ("relative_size", RAW),
    (VALIDATION, RAW),
    (VALIDATION, CALIBRATED),
)
RANDOM_IMAGES, NATURAL = "VaLM, random images − twin", "natural VaLM − natural twin"
PAIRS = {
    "VaLM − twin": (VALM, TWIN),
    "VaLM − Blind": (VALM, BLIND),
    "Blind − twin": (BLIND, TWIN),
    RANDOM_IMAGES: (("valm", "random"), TWIN),
    "VaLM, images off − twin": (("valm", "off"), TWIN),
    "VaLM, items' pictures taken out − twin": (("valm", "taken-out"), TWIN),
    "trained on random images − twin": (("random", "random"), TWIN),
    "trained on random images, images off − twin": (("random", "off"), TWIN),
    NATURAL: (("natural-valm", "retrieved"), ("natural-twin", "none")),
    "VaLM − base": (VALM, BASE),
    "VaLM with the cut − twin": (CUT, TWIN),
    "VaLM with the cut, random images − twin": (CUT_RANDOM, TWIN),
    "trained with the cut − twin": (("cut", "retrieved"), TWIN),
    "VaLM − captions in context": (VALM, ("context", "captions")),
    "VaLM − colours in context": (VALM, ("colored-context", "colored-captions")),
    "VaLM − late fusion": (VALM, ("late", "retrieved")),
    "colourless VaLM − colourless Blind": (COLORLESS, COLORLESS_BLIND),
    "colourless Blind − twin": (COLORLESS_BLIND, TWIN),
}
SEEN = {
    "random": "random images",
    "off": "images off",
    "taken-out": "items' pictures taken out",
    "exchanged": "red and blue exchanged",
    "other-colors": "images of another colour",
    "cut": "with the cut",
    "cut-random": "with the cut, random images",
    "captions": "given captions",
    "colored-captions": "given captions with colours",
}


class RetrievalTest(NamedTuple):
    """A test that only a model with a knowledge base can pass."""

    title: str
    arm: str
    of: str
    found: Found


def retrieval_tests(results: Results) -> list[RetrievalTest]:
    """How much more often the exchanged colour is answered with the exchanged images than with the original ones, and
    the gain in accuracy from having the items' pictures in the knowledge base, of the items that have one."""
    tests = []
    for arm in (name for name, one in ARMS.items() if one.twin is None):
        retrieved = (arm, "retrieved")
        for of in (PRIMARY, "color_terms", VALIDATION):
            for exchange in EXCHANGES:
                found = results.difference((arm, exchange), retrieved, of, exchange)
                tests.append((f"{ARMS[arm].title}, {SEEN[exchange]}, {set_title(of)}", arm, of, found))
            if of != VALIDATION:
                found = results.difference(retrieved, (arm, "taken-out"), of, keep=pictured)
                tests.append((f"{ARMS[arm].title}, pictures added, {set_title(of)}", arm, of, found))
    return [RetrievalTest(title, arm, of, found) for title, arm, of, found in tests if found is not None]


def perplexity_ratio(results: Results, arm: ArmTest, over: ArmTest, text: str) -> Found | None:
    """The perplexity of `arm` on a text over that of `over`; None if they are the same, or no seed has both."""
    nats = None if arm == over else results.difference(arm, over, text, NATS)
    return nats and nats._replace(value=math.exp(nats.value), low=math.exp(nats.low), high=math.exp(nats.high))


def points(found: Found) -> str:
    value, low, high = (f"{100 * number:+.1f}".replace("-", "−") for number in found[:3])
    return f"{value} [{low}, {high}]"


def points_and_p(found: Found) -> str:
    return points(found) + ("" if found.p is None else f", p {found.p:.3f}")


def tested(found: Found) -> str:
    return points(found) + (", not significant" if found.low <= 0 <= found.high else "")


def percent(found: Found) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in found[:3])
    return f"{value} [{low}, {high}]"


def times(found: Found) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def cell(found: Found | None, form: Callable[[Found], str], results: Results) -> str:
    """A number in a table of `results`, with its seeds where they are not all."""
    return "–" if found is None else form(found) + fewer_seeds(found, results)


def fewer_seeds(found: Found, results: Results) -> str:
    fewer = len(found.seeds) < len(results.numbers)
    return f" (seeds {', '.join(map(str, found.seeds))})" if fewer else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in lines)


def set_title(of: str) -> str:
    return SETS[of].title if of in SETS else "validation things"


def arm_title(arm: ArmTest) -> str:
    """Without what it saw, where that is what the arm is for."""
    name, images = arm
    return ARMS[name].title + (f", {SEEN[images]}" if images in SEEN else "")
