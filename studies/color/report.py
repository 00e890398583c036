"""The tables and the figure of docs/results/study.md, from the results of seeds: no number is typed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from studies.color.comparisons import (
    ALL_OF_PRIMARY,
    ALL_OF_VICOMTE,
    BASE,
    BLIND,
    CUT,
    IN_CONTEXT,
    PAIRS,
    RANDOM,
    SECONDARY,
    TWIN,
    VALIDATION_THINGS,
    VALM,
    WITH_PICTURE,
    WITHOUT_PICTURE,
    arm_title,
    cell,
    decided,
    follows,
    perplexity_ratio,
    raw_and_calibrated,
    set_title,
    table,
    times,
)
from studies.color.config import COLORED_CAPTIONS, EXCHANGES
from studies.color.figures import dose
from studies.color.hypotheses import SEEDS, hypotheses
from studies.color.questions import CAPTIONS_KIND
from studies.color.results import APART, CALIBRATED, RAW, Results, every
from valm.errors import ValmError
from valm.evaluation.sets import SETS
from valm.store.files import output_file, read_text, writable_folder
from valm_kernels.atomic_files import atomic_path

MARK = re.compile(r"<!-- study: ([\w-]+) of ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURE = "study-dose.png"


def write_page(results: Results, page: str | os.PathLike) -> None:
    """Writes the tables between the marks of `page`.

    A mark is `<!-- study: TABLE of STUDY -->`, and its table ends at `<!-- end -->`; those of other studies stay.

    Raises:
        ValmError: the page cannot be read, has a mark of no table, or none of this study.
    """
    path = Path(page)
    study, text = results.seeds[0]["study"], read_text(path)

    def filled(mark: re.Match) -> str:
        name, of = mark.groups()
        if name not in TABLES:
            raise ValmError(f"{path} has the mark of a table {name!r}, expected one of {', '.join(TABLES)}")
        return f"<!-- study: {name} of {of} -->\n{TABLES[name](results)}\n<!-- end -->" if of == study else mark[0]

    if study not in (of for _, of in MARK.findall(text)):
        mark = f"<!-- study: state of {study} -->"
        raise ValmError(f"{path} has no table of the study {study}: mark its place by lines {mark} and <!-- end -->")
    with output_file(path) as temporary:
        temporary.write_text(MARK.sub(filled, text), encoding="utf-8")


def write_figure(results: Results, images: str | os.PathLike) -> None:
    """Writes FIGURE into the folder `images`."""
    with atomic_path(writable_folder(images) / FIGURE) as temporary:
        dose(results).savefig(temporary, dpi=110, format="png", bbox_inches="tight")


def state(results: Results) -> str:
    """How many seeds there are, of which settings, what they were run on, and what could not be asked."""
    first = results.seeds[0]
    interim = "" if len(results.seeds) >= SEEDS else f" **Interim: the plan decides with {SEEDS} seeds.**"
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    missing = ""
    for of in dict.fromkeys(name for seed in results.seeds for name in seed["missing"]):
        seeds = [str(seed["seed"]) for seed in results.seeds if of in seed["missing"]]
        title = set_title(of) if of in SETS else of
        missing += f"\n\nNot asked, as the machine had no such file: {title} (seeds {', '.join(seeds)})."
    return (
        f"Seeds: {', '.join(map(str, results.numbers))}.{interim} Settings `{first['recipe']}` of the study "
        f"`{first['study']}`; {first['hardware']}, {first['threads']} threads; {versions}.{missing}"
    )


def answers(results: Results) -> str:
    """Every arm: what it answers, and what it costs in captions."""
    asked = (VALIDATION_THINGS, WITH_PICTURE, WITHOUT_PICTURE, ALL_OF_VICOMTE)
    arms = (BASE, TWIN, VALM, CUT, RANDOM, BLIND, IN_CONTEXT, ("base", COLORED_CAPTIONS))
    rows = []
    for arm in arms:
        if arm in results.arms:
            read = (arm[0], "none") if arm[1] == COLORED_CAPTIONS else arm  # captions are read as they are
            captions = perplexity_ratio(results, read, BASE, CAPTIONS_KIND)
            numbers = [raw_and_calibrated(results, arm, items) for items in asked]
            rows.append([arm_title(arm), *numbers, cell(captions, times, results)])
    heads = ["Right, %, raw / calibrated", *(items.title for items in asked), "captions, × the base's perplexity"]
    return table(heads, rows)


def secondary(results: Results) -> str:
    """VaLM with the cut beside the other arms on all other sets and some of their items."""
    rows = []
    for items in SECONDARY:
        for measure in (RAW, CALIBRATED, APART):
            found = [results.difference(*pair, items.of, measure, items.keep) for pair in PAIRS.values()]
            if any(found) and (measure != APART or items.keep is not every):
                rows.append([f"{items.title}, {measure}", *(cell(one, decided, results) for one in found)])
    return table(["VaLM with the cut, points [95 %]", *PAIRS], rows)


def exchanged(results: Results) -> str:
    """How VaLM with the cut follows images that others are put in the place of."""
    rows = []
    for exchange, title in zip(EXCHANGES, ("red and blue exchanged", "pictures of another colour"), strict=True):
        found = [follows(results, items, exchange) for items in (ALL_OF_PRIMARY, VALIDATION_THINGS)]
        rows.append([title, *(cell(one, decided, results) for one in found)])
    head = "VaLM with the cut answers the new colour more often by, points [95 %]"
    return table([head, ALL_OF_PRIMARY.title, VALIDATION_THINGS.title], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "state": state,
    "answers": answers,
    "hypotheses": hypotheses,
    "secondary": secondary,
    "exchanged": exchanged,
}
