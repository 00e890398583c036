"""The tables and figures of docs/results/study.md, from the results of its seeds: no number there is typed by hand."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from studies.color.config import ARMS, EXCHANGES, VALIDATION
from studies.color.questions import CAPTIONS_KIND, FLICKR_CAPTIONS
from studies.color.results import CALIBRATED, RAW, Results
from valm.errors import ValmError
from valm.evaluation.sets import SETS
from valm.evaluation.statistics import Difference, Estimate
from valm.explain.plots import FAINT, INK, SERIES, new_figure, quiet
from valm.store.files import atomic_path, output_file, read_text, writable_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALM, TWIN, BLIND = ("valm", "retrieved"), ("twin", "none"), ("blind", "retrieved")
# What the plan calls decisive: five seeds, and ten points.
SEEDS, POINTS = 5, 0.10
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
    NATURAL: (("natural-valm", "retrieved"), ("natural-twin", "none")),
}
NAMES = {
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
}
# Steps of the learning curves that are averaged.
WINDOW = 20


def write_page(results: Results, page: str | os.PathLike, images: str | os.PathLike) -> None:
    """Writes the tables between the marks of `page`, and the figures into `images`.

    A mark is `<!-- study: NAME -->`, and its table ends at `<!-- end -->`.

    Raises:
        ValmError: the page cannot be read, or has a mark of no table.
    """
    path, folder = Path(page), writable_folder(images)

    def filled(mark: re.Match) -> str:
        if mark[1] not in TABLES:
            raise ValmError(f"{path} has the mark of a table {mark[1]!r}, expected one of {', '.join(TABLES)}")
        return f"<!-- study: {mark[1]} -->\n{TABLES[mark[1]](results)}\n<!-- end -->"

    text = re.sub(r"<!-- study: ([\w-]+) -->\n.*?<!-- end -->", filled, read_text(path), flags=re.DOTALL)
    with output_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for name, draw in FIGURES.items():
        with atomic_path(folder / f"study-{name}.png") as temporary:
            draw(results).savefig(temporary, dpi=110, format="png", bbox_inches="tight")


def state(results: Results) -> str:
    """How many seeds there are, of which settings, and what they were run on."""
    seeds = ", ".join(str(seed["seed"]) for seed in results.seeds)
    first = results.seeds[0]
    interim = "" if len(results.seeds) >= SEEDS else f" **Interim: the plan decides with {SEEDS} seeds.**"
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    return (
        f"Seeds: {seeds}.{interim} Settings `{first['recipe']}` of the study `{first['study']}`; {first['hardware']}, "
        f"{first['threads']} threads; {versions}."
    )


def summary(results: Results) -> str:
    """The primary measure and two others, of VaLM beside the twin and beside Blind: the table of the README."""
    results = results.having(PRIMARY, VALM, TWIN)
    if not results.seeds:
        return "No seed has both models yet."
    pairs = ("VaLM − twin", "VaLM − Blind")
    seeds = ", ".join(str(seed["seed"]) for seed in results.seeds)
    lines = [f"| Points [95 %], seeds {seeds} of {SEEDS} | {' | '.join(pairs)} |", "| --- |" + " --- |" * len(pairs)]
    for what, of in (("MemoryColor", PRIMARY), ("things whose colour no text says", VALIDATION)):
        cells = []
        for pair in pairs:
            some = results.having(of, *PAIRS[pair])
            cells.append(_tested(some.difference(*PAIRS[pair], of)) + _fewer(some, results) if some.seeds else "–")
        lines.append(f"| right answers, {what} | {' | '.join(cells)} |")
    if (some := results.having(PRIMARY, VALM, ("valm", "exchanged"))).changes("exchanged", PRIMARY):
        follows, _ = some.follows("valm", "exchanged", PRIMARY)
        what = "answers that follow when the images' red and blue are exchanged, MemoryColor"
        lines.append(f"| {what} | {_tested(follows)}{_fewer(some, results)} | the same: Blind sees no image |")
    return "\n".join(lines)


def hypotheses(results: Results) -> str:
    """What became of each hypothesis; nothing is decided before all seeds are there."""
    rows = []

    def add(name: str, difference: Difference, holds: bool, some: Results) -> None:
        decided = len(some.seeds) >= SEEDS
        verdict = ("holds" if holds else "does not hold") if decided else ("so far yes" if holds else "so far no")
        rows.append(f"| {name} | {points(difference)} | {verdict}{_fewer(some, results)} |")

    def difference(pair: str) -> tuple[Difference | None, Results]:
        some = results.having(PRIMARY, *PAIRS[pair])
        return some.difference(*PAIRS[pair], PRIMARY) if some.seeds else None, some

    found, some = difference("VaLM − twin")
    if found:
        add("H1: VaLM − twin, MemoryColor, raw", found, found.value >= POINTS and found.low > 0, some)
    found, some = difference(RANDOM_IMAGES)
    if found:
        add("H2: the same with random images at test time", found, found.low <= 0, some)
    tests = _retrieval_tests(results)
    if tests:
        best = max(tests, key=lambda test: test.difference.low)
        name = f"H3: the clearest of {len(tests)} tests of retrieval: {best.title}"
        add(name, best.difference, best.difference.low > 0, best.results)
    found, some = difference("VaLM − Blind")
    if found:
        add("H4: VaLM − Blind, MemoryColor, raw", found, found.low > 0 or found.high < 0, some)
    found, some = difference(NATURAL)
    if found:
        add("H5: natural VaLM − natural twin, MemoryColor, raw", found, found.low > 0, some)
    return "\n".join(["| Hypothesis | Points [95 %] | |", "| --- | --- | --- |", *rows])


def differences(results: Results) -> str:
    """Every pair of arms on every measure."""
    measures = [measure for measure in MEASURES if measure[0] in results.sets()]
    pairs = {name: pair for name, pair in PAIRS.items() if all(arm in results.arms() for arm in pair)}
    lines = [f"| Points [95 %], p | {' | '.join(pairs)} |", "| --- |" + " --- |" * len(pairs)]
    for of, kind in measures:
        cells = []
        for pair in pairs.values():
            some = results.having(of, *pair)
            if some.seeds:
                difference = some.difference(*pair, of, kind)
                cells.append(f"{points(difference)}, {difference.p:.3f}{_fewer(some, results)}")
            else:
                cells.append("–")
        lines.append(f"| {_title(of)}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracies(results: Results) -> str:
    """Every arm, with everything that it saw when it was asked."""
    measures = [measure for measure in MEASURES if measure[0] in results.sets()]
    heads = [f"{_title(of)}, {kind}" for of, kind in measures]
    lines = [f"| Accuracy in percent [95 %] | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for arm, images in results.arms():
        cells = []
        for of, kind in measures:
            some = results.having(of, (arm, images))
            asked = percent(some.accuracy(arm, images, of, kind)) if some.seeds else "–"
            cells.append(asked + _fewer(some, results))
        lines.append(f"| {_arm(arm, images)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def retrieval(results: Results) -> str:
    """The tests that a model without a knowledge base cannot pass."""
    lines = ["| Test | Things | Points [95 %] | p |", "| --- | --- | --- | --- |"]
    for test in _retrieval_tests(results):
        numbers = f"{points(test.difference)}{_fewer(test.results, results)} | {test.difference.p:.3f}"
        lines.append(f"| {test.title} | {test.things} | {numbers} |")
    return "\n".join(lines)


def perplexities(results: Results) -> str:
    """Of held-out text, per token, and how many times that of the twin of the same corpus."""
    texts = results.texts()
    lines = [f"| Perplexity per token, × the twin's [95 %] | {' | '.join(texts)} |", "| --- |" + " --- |" * len(texts)]
    for arm, images in results.arms():
        corpus = ARMS[arm].corpus
        twin = next((name, "none") for name, one in ARMS.items() if (one.twin, one.corpus) == ("text", corpus))
        cells = []
        for text in texts:
            some = results.having(text, (arm, images))
            cell = f"{some.perplexity(arm, images, text).value:.1f}" if some.seeds else "–"
            both = some.having(text, twin)
            if (arm, images) != twin and both.seeds:
                difference = both.nats_difference((arm, images), twin, text)
                value, low, high = (math.exp(nats) for nats in _numbers(difference))
                cell += f", {value:.2f} [{low:.2f}, {high:.2f}]{_fewer(both, some)}"
            cells.append(cell + _fewer(some, results))
        lines.append(f"| {_arm(arm, images)} | {' | '.join(cells)} |")
    if texts and CAPTIONS_KIND not in texts:
        lines.append(f"\nNo captions of Flickr8k were read: VALM_EVAL_DATA names no folder that has {FLICKR_CAPTIONS}.")
    return "\n".join(lines)


def seconds(results: Results) -> str:
    """How long the stages took, mean of the seeds."""
    stages = dict.fromkeys(stage for seed in results.seeds for stage in seed["seconds"])
    lines = ["| Stage of a seed | Seconds |", "| --- | --- |"]
    for stage in stages:
        taken = [seed["seconds"][stage] for seed in results.seeds if stage in seed["seconds"]]
        lines.append(f"| {stage} | {np.mean(taken):.0f} |")
    return "\n".join(lines)


def clips(results: Results) -> str:
    """What the CLIP of each seed was found to be."""
    numbers = {name: value for name, value in results.seeds[0]["clip"].items() if isinstance(value, int | float)}
    lines = ["| CLIP | " + " | ".join(f"seed {seed['seed']}" for seed in results.seeds) + " |"]
    lines.append("| --- |" + " --- |" * len(results.seeds))
    for name in numbers:
        lines.append(f"| {name} | " + " | ".join(f"{seed['clip'][name]:.3f}" for seed in results.seeds) + " |")
    return "\n".join(lines)


def counts(results: Results) -> str:
    """What the text of each seed is, and what the filter dropped."""
    lines = ["| Text | " + " | ".join(f"seed {seed['seed']}" for seed in results.seeds) + " |"]
    lines.append("| --- |" + " --- |" * len(results.seeds))
    for name in results.seeds[0]["counts"]:
        lines.append(f"| {name} | " + " | ".join(f"{seed['counts'].get(name, 0):,}" for seed in results.seeds) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "state": state,
    "summary": summary,
    "hypotheses": hypotheses,
    "differences": differences,
    "accuracies": accuracies,
    "retrieval": retrieval,
    "perplexities": perplexities,
    "seconds": seconds,
    "clips": clips,
    "counts": counts,
}


def forest(results: Results) -> Figure:
    """The differences of the plan with their intervals, in points."""
    rows = []
    for name, (first, second) in PAIRS.items():
        for of, kind in MEASURES[:6]:
            some = results.having(of, first, second)
            if some.seeds:
                title = f"{name}: {_title(of)}, {kind}{_fewer(some, results)}"
                rows.append((title, some.difference(first, second, of, kind)))
    rows += [(test.title + _fewer(test.results, results), test.difference) for test in _retrieval_tests(results)]
    return _intervals(rows, 9)


def overview(results: Results) -> Figure:
    """A few of the differences of `forest`, for the README."""
    asked = [("colours that no text says, VaLM − twin", "VaLM − twin", VALIDATION)]
    asked += [(f"{_title(of)}, VaLM − twin", "VaLM − twin", of) for of in (PRIMARY, *SECONDARY)]
    asked += [(f"{_title(PRIMARY)}, {name}", name, PRIMARY) for name in (RANDOM_IMAGES, "VaLM − Blind", NATURAL)]
    rows = []
    for title, name, of in asked:
        some = results.having(of, *PAIRS[name])
        if some.seeds:
            rows.append((title + _fewer(some, results), some.difference(*PAIRS[name], of)))
    tests = [test for test in _retrieval_tests(results) if (test.arm, test.of) == ("valm", PRIMARY)]
    return _intervals(rows + [(test.title + _fewer(test.results, results), test.difference) for test in tests], 6)


def _intervals(rows: Sequence[tuple[str, Difference]], width: float) -> Figure:
    """A line for each difference: a dot and its interval, coloured where that excludes 0."""
    figure = new_figure(width, 0.6 + 0.22 * len(rows))
    axes = figure.subplots()
    for place, (_, difference) in enumerate(rows):
        color = SERIES[0] if difference.low > 0 else SERIES[1] if difference.high < 0 else INK
        axes.plot([100 * difference.low, 100 * difference.high], [place, place], color=color, linewidth=1.4)
        axes.plot(100 * difference.value, place, "o", color=color, markersize=4)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points, with the 95 % interval over items and seeds")
    quiet(axes)
    return figure


def curves(results: Results) -> Figure:
    """The loss of every arm against the step, mean of the seeds and of WINDOW steps."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for number, arm in enumerate(dict.fromkeys(arm for seed in results.seeds for arm in seed["losses"])):
        runs = [seed["losses"][arm] for seed in results.seeds if seed["losses"].get(arm)]
        if not runs:
            continue
        mean = np.mean([run[: min(map(len, runs))] for run in runs], axis=0)
        width = min(WINDOW, len(mean))
        smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
        line = "-" if number < len(SERIES) else "--"
        color = SERIES[number % len(SERIES)]
        axes.plot(np.arange(width, len(mean) + 1), smooth, line, color=color, label=NAMES[arm], linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {"forest": forest, "overview": overview, "curves": curves}


def points(difference: Difference) -> str:
    value, low, high = (f"{100 * number:+.1f}".replace("-", "−") for number in _numbers(difference))
    return f"{value} [{low}, {high}]"


def _tested(difference: Difference) -> str:
    return points(difference) + (", not significant" if difference.low <= 0 <= difference.high else "")


def percent(estimate: Estimate) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in _numbers(estimate))
    return f"{value} [{low}, {high}]"


def _numbers(found: Estimate | Difference) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def _title(of: str) -> str:
    return SETS[of].title if of in SETS else "validation things"


def _arm(arm: str, images: str) -> str:
    return NAMES[arm] + (f", {SEEN[images]}" if SEEN[images] else "")


def _fewer(some: Results, results: Results) -> str:
    """Which seeds a number is of, where they are not all seeds of the page."""
    if not some.seeds or len(some.seeds) == len(results.seeds):
        return ""
    return f" (seeds {', '.join(str(seed['seed']) for seed in some.seeds)})"


class RetrievalTest(NamedTuple):
    """A test that only a model with a knowledge base can pass: its arm, set and difference, of how many things and
    which seeds."""

    title: str
    arm: str
    of: str
    difference: Difference
    things: int
    results: Results


def _retrieval_tests(results: Results) -> list[RetrievalTest]:
    found = []
    for arm in (name for name, one in ARMS.items() if one.twin is None):
        retrieved = (arm, "retrieved")
        for of in (PRIMARY, "color_terms", VALIDATION):
            for exchange in EXCHANGES:
                some = results.having(of, retrieved, (arm, exchange))
                if some.changes(exchange, of):
                    title = f"{NAMES[arm]}, {SEEN[exchange]}, {_title(of)}"
                    found.append(RetrievalTest(title, arm, of, *some.follows(arm, exchange, of), some))
            some = results.having(of, retrieved, (arm, "taken-out"))
            if of != VALIDATION and some.seeds and any(some.seeds[0]["sets"][of]["pictured"]):
                title = f"{NAMES[arm]}, pictures added, {_title(of)}"
                found.append(RetrievalTest(title, arm, of, *some.added(arm, of), some))
    return found
