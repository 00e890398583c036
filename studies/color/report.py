"""The tables and figures of docs/results/study.md, from the results of its seeds: no number there is typed by hand."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from studies.color.config import ARMS, EXCHANGES, TRAINED, VALIDATION
from studies.color.leaks import without_leaks
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
BASE, CUT, CUT_RANDOM = ("base", "none"), ("valm", "cut"), ("valm", "cut-random")
CONTEXT, LATE = ("context", "captions"), ("late", "retrieved")
COLORLESS, COLORLESS_BLIND = ("colorless-valm", "retrieved"), ("colorless-blind", "retrieved")
NATURAL_VALM, NATURAL_TWIN = ("natural-valm", "retrieved"), ("natural-twin", "none")
# What the plan calls decisive: five seeds, and ten points.
SEEDS, POINTS = 5, 0.10
# Of the second study: seeds of the arms that not all have; points of S7; the share of a gain of S2; and the ratios of
# perplexities of S3, of which the second is for the upper ends of the intervals.
SOME_SEEDS, KNOWLEDGE_POINTS, KEPT, RATIO, UPPER_RATIO = 3, 0.05, 0.9, 1.0, 1.05
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
OF_EACH_SEED = (
    *("VaLM − twin", "VaLM − Blind", RANDOM_IMAGES, "VaLM with the cut − twin"),
    *("VaLM − captions in context", "VaLM − late fusion", "colourless VaLM − colourless Blind"),
)
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
# Steps of the learning curves that are averaged.
WINDOW = 20


def write_page(results: Results, page: str | os.PathLike, images: str | os.PathLike) -> None:
    """Writes the tables between the marks of `page`, and the figures into `images`.

    A mark is `<!-- study: TABLE -->`, and its table ends at `<!-- end -->`. `<!-- study: TABLE of NAME -->` is of the
    study NAME alone; where a page has such marks of the results' study, only these are written, and its figures are
    `study-NAME-….png`. Held-out paragraphs that stand in the training text too are left out (`studies.color.leaks`).

    Raises:
        ValmError: the page cannot be read, or has a mark of no table.
    """
    path, folder = Path(page), writable_folder(images)
    results = without_leaks(results)

    study, text = results.seeds[0]["study"], read_text(path)
    own = f" of {study}" if f" of {study} -->" in text else ""

    def filled(mark: re.Match) -> str:
        table, of = mark[1], mark[2] or ""
        if table not in TABLES:
            raise ValmError(f"{path} has the mark of a table {table!r}, expected one of {', '.join(TABLES)}")
        return f"<!-- study: {table}{of} -->\n{TABLES[table](results)}\n<!-- end -->" if of == own else mark[0]

    pattern = r"<!-- study: ([\w-]+)( of [\w-]+)? -->\n.*?<!-- end -->"
    written = re.sub(pattern, filled, text, flags=re.DOTALL)
    with output_file(path) as temporary:
        temporary.write_text(written, encoding="utf-8")
    prefix = f"study-{study}" if own else "study"
    for name, draw in FIGURES.items():
        with atomic_path(folder / f"{prefix}-{name}.png") as temporary:
            draw(results).savefig(temporary, dpi=110, format="png", bbox_inches="tight")


def state(results: Results) -> str:
    """How many seeds there are, of which settings, and what they were run on."""
    seeds = ", ".join(str(seed["seed"]) for seed in results.seeds)
    first = results.seeds[0]
    interim = "" if len(results.seeds) >= SEEDS else f" **Interim: the plan decides with {SEEDS} seeds.**"
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    missing = "".join(
        f"\n\nNot asked, as the machine had no such file: {_title(of) if of in SETS else of} (seeds "
        f"{', '.join(map(str, seeds))})."
        for of, seeds in results.missing().items()
    )
    leaked = [seed["leaked"] for seed in results.seeds if "leaked" in seed]
    if leaked:
        numbers, of = ", ".join(str(number) for number, _ in leaked), leaked[0][1]
        missing += f"\n\nProse is read without the {numbers} of {of} paragraphs that stand in the training text too."
    return (
        f"Seeds: {seeds}.{interim} Settings `{first['recipe']}` of the study `{first['study']}`; {first['hardware']}, "
        f"{first['threads']} threads; {versions}.{missing}"
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


def claims(results: Results) -> str:
    """What became of the hypotheses of the second study (docs/results/study-plan.md). None is decided before its seeds
    are there."""
    lines = ["| Hypothesis | Found [95 %] | |", "| --- | --- | --- |"]

    def add(name: str, seeds: int, holds: Callable[..., bool], *asked: tuple[str, str, str]) -> None:
        """A row about differences (pair, set, kind), if there are seeds that have all."""
        some = results
        for pair, of, _ in asked:
            some = some.having(of, *PAIRS[pair])
        if some.seeds:
            found = [some.difference(*PAIRS[pair], of, kind) for pair, of, kind in asked]
            what = "; ".join(f"{_title(one[1])} {points(each)}" for one, each in zip(asked, found, strict=True))
            row(name, what, holds(*found), some, seeds)

    def row(name: str, what: str, holds: bool, some: Results, seeds: int) -> None:
        decided = len(some.seeds) >= seeds
        verdict = ("holds" if holds else "does not hold") if decided else ("so far yes" if holds else "so far no")
        lines.append(f"| {name} | {what}{_fewer(some, results)} | {verdict} |")

    def two(pair: str) -> list[tuple[str, str, str]]:
        return [(pair, VALIDATION, RAW), (pair, PRIMARY, RAW)]

    def better(things: Difference, items: Difference) -> bool:
        return min(things.low, items.low) > 0 and items.value >= POINTS

    cut = "VaLM with the cut − twin"
    add("S1: VaLM − twin", SEEDS, better, *two("VaLM − twin"))
    add(
        f"S2: {cut}, and at least {KEPT:.0%} of VaLM's on validation things",
        SEEDS,
        lambda things, items, whole: better(things, items) and things.value >= KEPT * whole.value,
        *two(cut),
        ("VaLM − twin", VALIDATION, RAW),
    )
    harmless = _harm(results, CUT)
    if harmless:
        ratios = [ratio for ratio in harmless if ratio.over == TWIN or ratio.text != CAPTIONS_KIND]
        holds = all(ratio.value <= RATIO and ratio.high <= UPPER_RATIO for ratio in ratios)
        what = "; ".join(f"{ratio.text} × the {NAMES[ratio.over[0]]}'s {ratio}" for ratio in ratios)
        complete = {(ratio.text, ratio.over) for ratio in harmless} >= {(CAPTIONS_KIND, TWIN)}
        row("S3: perplexity of VaLM with the cut", what, holds and complete, harmless[0].results, SEEDS)
    add(
        "S4: VaLM with the cut, random images − twin, calibrated",
        SEEDS,
        lambda found: found.high >= 0,
        ("VaLM with the cut, random images − twin", PRIMARY, CALIBRATED),
    )
    add("S5: VaLM − captions in context", SEEDS, _above, ("VaLM − captions in context", VALIDATION, RAW))
    add("S6: VaLM − late fusion", SOME_SEEDS, _differs, ("VaLM − late fusion", VALIDATION, RAW))
    add(
        "S7: colourless VaLM − colourless Blind",
        SOME_SEEDS,
        lambda things, items: (
            min(things.low, items.low) > 0 and things.value >= POINTS and items.value >= KNOWLEDGE_POINTS
        ),
        *two("colourless VaLM − colourless Blind"),
    )
    add(
        "S8: colourless Blind − twin",
        SOME_SEEDS,
        lambda found: found.low <= 0,
        ("colourless Blind − twin", VALIDATION, RAW),
    )
    add("S9: natural VaLM − natural twin", SOME_SEEDS, _above, (NATURAL, VALIDATION, RAW))
    return "\n".join(lines)


def _above(found: Difference) -> bool:
    return found.low > 0


def _differs(found: Difference) -> bool:
    return found.low > 0 or found.high < 0


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


def _harm(results: Results, asked: tuple[str, str]) -> list[Ratio]:
    """The perplexities of `asked` over those of the base and of the twin."""
    found = []
    for text in results.texts():
        for over in (BASE, TWIN):
            some = results.having(text, asked, over)
            if over != asked and some.seeds:
                value, low, high = map(math.exp, _numbers(some.nats_difference(asked, over, text)))
                found.append(Ratio(text, over, value, low, high, some))
    return found


def harm(results: Results) -> str:
    """What each arm costs in ordinary text: its perplexities over the base's and over the twin's."""
    texts = results.texts()
    heads = [f"{text}, × the {NAMES[arm]}'s" for text in texts for arm, _ in (BASE, TWIN)]
    lines = [f"| Perplexity [95 %] | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for arm in results.arms():
        ratios = {(ratio.text, ratio.over): ratio for ratio in _harm(results, arm)}
        cells = [ratios.get((text, over)) for text in texts for over in (BASE, TWIN)]
        if ratios:
            shown = ["–" if cell is None else f"{cell}{_fewer(cell.results, results)}" for cell in cells]
            lines.append(f"| {_arm(*arm)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def harm_row(results: Results) -> str:
    """A row below `summary`: what images with the cut cost in ordinary text; empty for results without a base."""
    ratios = [ratio for ratio in _harm(results, CUT) if BASE in results.arms()]
    cells = [
        ", ".join(f"{ratio.text} {ratio}{_fewer(ratio.results, results)}" for ratio in ratios if ratio.over == over)
        for over in (TWIN, BASE)
    ]
    row = f"\n| perplexity with the cut, × the twin's | {cells[0]} | × the base's: {cells[1]} |"
    return row if ratios else ""


def pictured(results: Results) -> str:
    """The differences on the items that have a picture, and on those that have none."""
    asked = [
        (of, kind) for of, kind in MEASURES if any("pictured" in seed["sets"].get(of, ()) for seed in results.seeds)
    ]
    lines = [
        "| Points [95 %] | Set | Items with a picture | | Items without | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pair, (first, second) in PAIRS.items():
        for of, kind in asked:
            some = results.having(of, first, second)
            if not some.seeds or some.pictured(of).all():  # as all validation things have one
                continue
            cells = []
            for with_picture in (True, False):
                count = int((some.pictured(of) == with_picture).sum())
                difference = some.difference(first, second, of, kind, with_picture) if count else None
                cells += [str(count), "–" if difference is None else points(difference)]
            lines.append(f"| {pair} | {_title(of)}, {kind}{_fewer(some, results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trainings(results: Results) -> str:
    """Where each arm's training stopped, and how much of the base it was mixed with; a number for each seed."""
    arms = dict.fromkeys(arm for seed in results.seeds for arm in seed.get("training", {}))
    lines = [
        "| Training | best step | share of the base | perplexity on what was held out |",
        "| --- | --- | --- | --- |",
    ]
    for arm in arms:
        numbers = [seed.get("training", {}).get(arm, {}) for seed in results.seeds]
        cells = []
        for name, form in (("steps", ".0f"), ("base_share", ".3f"), ("eval_perplexity", ".1f")):
            cells.append(", ".join(f"{one[name]:{form}}" for one in numbers if name in one) or "–")
        lines.append(f"| {NAMES[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(results: Results) -> str:
    """Every pair of arms on every measure; of one seed with the p-value."""
    measures = [measure for measure in MEASURES if measure[0] in results.sets()]
    pairs = {name: pair for name, pair in PAIRS.items() if all(arm in results.arms() for arm in pair)}
    lines = [f"| Points [95 %] | {' | '.join(pairs)} |", "| --- |" + " --- |" * len(pairs)]
    for of, kind in measures:
        cells = []
        for pair in pairs.values():
            some = results.having(of, *pair)
            if some.seeds:
                difference = some.difference(*pair, of, kind)
                cells.append(f"{points(difference)}{_p(difference)}{_fewer(some, results)}")
            else:
                cells.append("–")
        lines.append(f"| {_title(of)}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_seed(results: Results) -> str:
    """The differences that most is said about, seed by seed, as an interval over few seeds is too narrow."""
    asked = [(pair, of) for of in (PRIMARY, VALIDATION) for pair in OF_EACH_SEED]
    numbers = [seed["seed"] for seed in results.seeds]
    lines = [f"| Points | {' | '.join(f'seed {number}' for number in numbers)} |", "| --- |" + " --- |" * len(numbers)]
    for pair, of in asked:
        found = {}
        for seed in results.having(of, *PAIRS[pair]).seeds:
            found[seed["seed"]] = 100 * Results((seed,)).difference(*PAIRS[pair], of).value
        if found:
            cells = [f"{found[number]:+.1f}".replace("-", "−") if number in found else "–" for number in numbers]
            lines.append(f"| {pair}, {_title(of)} | {' | '.join(cells)} |")
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
    lines = ["| Test | Things | Points [95 %] |", "| --- | --- | --- |"]
    for test in _retrieval_tests(results):
        numbers = f"{points(test.difference)}{_p(test.difference)}{_fewer(test.results, results)}"
        lines.append(f"| {test.title} | {test.things} | {numbers} |")
    return "\n".join(lines)


def perplexities(results: Results) -> str:
    """Of held-out text, per token, and how many times that of the twin of the same corpus."""
    texts = results.texts()
    lines = [f"| Perplexity per token, × the twin's [95 %] | {' | '.join(texts)} |", "| --- |" + " --- |" * len(texts)]
    for arm, images in results.arms():
        corpus = ARMS[arm].corpus
        twin = next(
            (name, "none")
            for name, one in ARMS.items()
            if (one.twin, one.corpus, one.made) == ("text", corpus, TRAINED)
        )
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
        of_seeds = (seed["clip"].get(name) for seed in results.seeds)  # not all have a second CLIP
        lines.append(f"| {name} | {' | '.join('–' if one is None else f'{one:.3f}' for one in of_seeds)} |")
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
    "summary": lambda results: summary(results) + harm_row(results),
    "hypotheses": hypotheses,
    "claims": claims,
    "harm": harm,
    "pictured": pictured,
    "trainings": trainings,
    "differences": differences,
    "seedwise": by_seed,
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


def _p(difference: Difference) -> str:
    return "" if difference.p is None else f", p {difference.p:.3f}"


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
