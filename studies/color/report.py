"""The tables and figures of docs/results/study.md, from the results of its seeds: no number there is typed by hand."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from studies.color.comparisons import (
    BASE,
    CUT,
    MEASURES,
    NAMES,
    PAIRS,
    PRIMARY,
    RANDOM_IMAGES,
    TWIN,
    VALM,
    arm_title,
    fewer_seeds,
    harm_ratios,
    p_note,
    percent,
    points,
    retrieval_tests,
    set_title,
    tested,
    with_bounds,
)
from studies.color.config import ARMS, TRAINED, VALIDATION
from studies.color.figures import FIGURES
from studies.color.hypotheses import SEEDS, claims, hypotheses
from studies.color.leaks import without_leaks
from studies.color.questions import CAPTIONS_KIND, FLICKR_CAPTIONS
from studies.color.results import Results
from valm.errors import ValmError
from valm.evaluation.sets import SETS
from valm.store.files import output_file, read_text, writable_folder
from valm_kernels.atomic_files import atomic_path

# Pairs whose differences are shown seed by seed.
OF_EACH_SEED = (
    *("VaLM − twin", "VaLM − Blind", RANDOM_IMAGES, "VaLM with the cut − twin"),
    *("VaLM − captions in context", "VaLM − late fusion", "colourless VaLM − colourless Blind"),
)


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
        f"\n\nNot asked, as the machine had no such file: {set_title(of) if of in SETS else of} (seeds "
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
    planned = "" if len(results.seeds) >= SEEDS else f" of {SEEDS}"
    lines = [f"| Points [95 %], seeds {seeds}{planned} | {' | '.join(pairs)} |", "| --- |" + " --- |" * len(pairs)]
    for what, of in (("MemoryColor", PRIMARY), ("things whose colour no text says", VALIDATION)):
        cells = []
        for pair in pairs:
            some = results.having(of, *PAIRS[pair])
            cells.append(tested(some.difference(*PAIRS[pair], of)) + fewer_seeds(some, results) if some.seeds else "–")
        lines.append(f"| right answers, {what} | {' | '.join(cells)} |")
    if (some := results.having(PRIMARY, VALM, ("valm", "exchanged"))).changes("exchanged", PRIMARY):
        follows, _ = some.follows("valm", "exchanged", PRIMARY)
        what = "answers that follow when the images' red and blue are exchanged, MemoryColor"
        lines.append(f"| {what} | {tested(follows)}{fewer_seeds(some, results)} | the same: Blind sees no image |")
    return "\n".join(lines)


def harm(results: Results) -> str:
    """What each arm costs in ordinary text: its perplexities over the base's and over the twin's."""
    texts = results.texts()
    heads = [f"{text}, × the {NAMES[arm]}'s" for text in texts for arm, _ in (BASE, TWIN)]
    lines = [f"| Perplexity [95 %] | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for arm in results.arms():
        ratios = {(ratio.text, ratio.over): ratio for ratio in harm_ratios(results, arm)}
        cells = [ratios.get((text, over)) for text in texts for over in (BASE, TWIN)]
        if ratios:
            shown = ["–" if cell is None else f"{cell}{fewer_seeds(cell.results, results)}" for cell in cells]
            lines.append(f"| {arm_title(*arm)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def harm_row(results: Results) -> str:
    """A row below `summary`: what images with the cut cost in ordinary text; empty for results without a base."""
    ratios = [ratio for ratio in harm_ratios(results, CUT) if BASE in results.arms()]
    cells = [
        ", ".join(
            f"{ratio.text} {ratio}{fewer_seeds(ratio.results, results)}" for ratio in ratios if ratio.over == over
        )
        for over in (TWIN, BASE)
    ]
    row = f"\n| perplexity with the cut (`min_score`), × the twin's | {cells[0]} | × the base's: {cells[1]} |"
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
            lines.append(f"| {pair} | {set_title(of)}, {kind}{fewer_seeds(some, results)} | {' | '.join(cells)} |")
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
                cells.append(f"{points(difference)}{p_note(difference)}{fewer_seeds(some, results)}")
            else:
                cells.append("–")
        lines.append(f"| {set_title(of)}, {kind} | {' | '.join(cells)} |")
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
            lines.append(f"| {pair}, {set_title(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracies(results: Results) -> str:
    """Every arm, with everything that it saw when it was asked."""
    measures = [measure for measure in MEASURES if measure[0] in results.sets()]
    heads = [f"{set_title(of)}, {kind}" for of, kind in measures]
    lines = [f"| Accuracy in percent [95 %] | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for arm, images in results.arms():
        cells = []
        for of, kind in measures:
            some = results.having(of, (arm, images))
            asked = percent(some.accuracy(arm, images, of, kind)) if some.seeds else "–"
            cells.append(asked + fewer_seeds(some, results))
        lines.append(f"| {arm_title(arm, images)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def retrieval(results: Results) -> str:
    """The tests that a model without a knowledge base cannot pass."""
    lines = ["| Test | Things | Points [95 %] |", "| --- | --- | --- |"]
    for test in retrieval_tests(results):
        numbers = f"{points(test.difference)}{p_note(test.difference)}{fewer_seeds(test.results, results)}"
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
                value, low, high = (math.exp(nats) for nats in with_bounds(difference))
                cell += f", {value:.2f} [{low:.2f}, {high:.2f}]{fewer_seeds(both, some)}"
            cells.append(cell + fewer_seeds(some, results))
        lines.append(f"| {arm_title(arm, images)} | {' | '.join(cells)} |")
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
