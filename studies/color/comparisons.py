"""What the study's page compares: arms, pairs of them and measures, and how their numbers are written."""

from __future__ import annotations

import math
from typing import NamedTuple

from studies.color.config import ARMS, EXCHANGES, VALIDATION
from studies.color.results import CALIBRATED, RAW, Results
from valm.evaluation.sets import SETS
from valm.evaluation.statistics import Difference, Estimate

VALM, TWIN, BLIND = ("valm", "retrieved"), ("twin", "none"), ("blind", "retrieved")
BASE, CUT, CUT_RANDOM = ("base", "none"), ("valm", "cut"), ("valm", "cut-random")
CONTEXT, LATE = ("context", "captions"), ("late", "retrieved")
COLORLESS, COLORLESS_BLIND = ("colorless-valm", "retrieved"), ("colorless-blind", "retrieved")
NATURAL_VALM, NATURAL_TWIN = ("natural-valm", "retrieved"), ("natural-twin", "none")
PRIMARY, SECONDARY = "memory_color", ("color_terms", "vicomte_color")
# (set, kind) in the order of the plan: the primary measure, then the secondary ones.
MEASURES = (
    (PRIMARY, RAW),
    (PRIMARY, CALIBRATED),
    ("color_terms", RAW),
    ("color_terms", CALIBRATED),
    ("vicomte_color", RAW),
    ("vicomte_color", CALIBRATED),
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
    "trained on noise − twin": (("noise", "noise"), TWIN),
    "trained on noise, images off − twin": (("noise", "off"), TWIN),
    NATURAL: (NATURAL_VALM, NATURAL_TWIN),
    "VaLM − base": (VALM, BASE),
    "VaLM with the cut − twin": (CUT, TWIN),
    "VaLM with the cut, random images − twin": (CUT_RANDOM, TWIN),
    "trained with the cut − twin": (("cut", "retrieved"), TWIN),
    "VaLM − captions in context": (VALM, CONTEXT),
    "VaLM − colours in context": (VALM, ("colored-context", "colored-captions")),
    "VaLM − late fusion": (VALM, LATE),
    "colourless VaLM − colourless Blind": (COLORLESS, COLORLESS_BLIND),
    "colourless Blind − twin": (COLORLESS_BLIND, TWIN),
}
NAMES = {
    "base": "base",
    "cut": "trained with the cut",
    "context": "captions in context",
    "colored-context": "colours in context",
    "late": "late fusion",
    "colorless-valm": "colourless VaLM",
    "colorless-blind": "colourless Blind",
    "twin": "twin",
    "valm": "VaLM",
    "blind": "Blind",
    "random": "trained on random images",
    "noise": "trained on noise",
    "natural-twin": "natural twin",
    "natural-valm": "natural VaLM",
}
SEEN = {
    "none": "",
    "retrieved": "",
    "random": "random images",
    "off": "images off",
    "taken-out": "items' pictures taken out",
    "noise": "",
    "exchanged": "red and blue exchanged",
    "other-colors": "images of another colour",
    "cut": "with the cut",
    "cut-random": "with the cut, random images",
    "captions": "given captions",
    "colored-captions": "given captions with colours",
}


class RetrievalTest(NamedTuple):
    """A test that only a model with a knowledge base can pass: its arm, set and difference, of how many things and
    which seeds."""

    title: str
    arm: str
    of: str
    difference: Difference
    things: int
    results: Results


def retrieval_tests(results: Results) -> list[RetrievalTest]:
    found = []
    for arm in (name for name, one in ARMS.items() if one.twin is None):
        retrieved = (arm, "retrieved")
        for of in (PRIMARY, "color_terms", VALIDATION):
            for exchange in EXCHANGES:
                some = results.having(of, retrieved, (arm, exchange))
                if some.changes(exchange, of):
                    title = f"{NAMES[arm]}, {SEEN[exchange]}, {set_title(of)}"
                    found.append(RetrievalTest(title, arm, of, *some.follows(arm, exchange, of), some))
            some = results.having(of, retrieved, (arm, "taken-out"))
            if of != VALIDATION and some.seeds and any(some.seeds[0]["sets"][of]["pictured"]):
                title = f"{NAMES[arm]}, pictures added, {set_title(of)}"
                found.append(RetrievalTest(title, arm, of, *some.added(arm, of), some))
    return found


class Ratio(NamedTuple):
    """A perplexity over that of `over` (arm, images) on a text, with its interval, of which seeds."""

    text: str
    over: tuple[str, str]
    value: float
    low: float
    high: float
    results: Results

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def harm_ratios(results: Results, asked: tuple[str, str]) -> list[Ratio]:
    """The perplexities of `asked` over those of the base and of the twin."""
    found = []
    for text in results.texts():
        for over in (BASE, TWIN):
            some = results.having(text, asked, over)
            if over != asked and some.seeds:
                value, low, high = map(math.exp, with_bounds(some.nats_difference(asked, over, text)))
                found.append(Ratio(text, over, value, low, high, some))
    return found


def points(difference: Difference) -> str:
    value, low, high = (f"{100 * number:+.1f}".replace("-", "−") for number in with_bounds(difference))
    return f"{value} [{low}, {high}]"


def p_note(difference: Difference) -> str:
    return "" if difference.p is None else f", p {difference.p:.3f}"


def tested(difference: Difference) -> str:
    return points(difference) + (", not significant" if difference.low <= 0 <= difference.high else "")


def percent(estimate: Estimate) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in with_bounds(estimate))
    return f"{value} [{low}, {high}]"


def with_bounds(found: Estimate | Difference) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def set_title(of: str) -> str:
    return SETS[of].title if of in SETS else "validation things"


def arm_title(arm: str, images: str) -> str:
    return NAMES[arm] + (f", {SEEN[images]}" if SEEN[images] else "")


def fewer_seeds(some: Results, results: Results) -> str:
    """Which seeds a number is of, where they are not all seeds of the page."""
    if not some.seeds or len(some.seeds) == len(results.seeds):
        return ""
    return f" (seeds {', '.join(str(seed['seed']) for seed in some.seeds)})"
