"""The tables of PAGES and the figure of docs/results/study.md, from the results of seeds: no number is typed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from studies.color.claims import SEEDS, claims
from studies.color.comparisons import (
    ALL_OF_PEOPLE,
    ALL_OF_VICOMTE,
    BASE,
    CONTROL,
    EXCHANGE_TITLES,
    MEASURES,
    OTHERS,
    PROMPT,
    RANDOM,
    SECONDARY,
    VALIDATION_OBJECTS,
    VALM,
    WITH_PICTURE,
    WITHOUT_PICTURE,
    arm_title,
    cell,
    decided,
    follows,
    learned,
    perplexity_ratio,
    points,
    raw_and_calibrated,
    set_title,
    table,
    times,
    with_and_without,
)
from studies.color.figures import curve as figure_of_curve
from studies.color.questions import CAPTIONS_KIND
from studies.color.results import APART, CALIBRATED, RAW, ArmTest, Found, Results, every
from valm.errors import ValmError
from valm.evaluation.sets import SETS
from valm.store.files import output_file, read_text, writable_folder
from valm_kernels.atomic_files import atomic_path

MARK = re.compile(r"<!-- study: ([\w-]+) of ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
PAGES = ("README.md", "docs/results/study.md", "studies/color/archive.md")
# What the README compares VaLM with, of OTHERS.
SUMMARIZED = ("base model", "query control", "colours in the prompt")
# The arms in the table of answers.
ARMS: tuple[ArmTest, ...] = (BASE, VALM, CONTROL, RANDOM, PROMPT)
# The kinds of text whose perplexity is compared.
TEXTS = ("glosses", "prose", CAPTIONS_KIND)


def write_pages(results: Results, pages: Sequence[str | os.PathLike]) -> list[Path]:
    """Writes the tables between the marks of `pages`, and returns the pages with marks of this study.

    A mark is `<!-- study: TABLE of STUDY -->`, and its table ends at `<!-- end -->`; those of other studies stay.

    Raises:
        ValmError: a page cannot be read or has a mark of no table, or no page has a mark of this study.
    """
    study, paths = results.seeds[0]["study"], list(map(Path, pages))
    written = {path: text for path in paths if (text := _with_tables(results, path)) is not None}
    if not written:
        mark = f"<!-- study: state of {study} -->"
        raise ValmError(
            f"no table of the study {study} is in {', '.join(map(str, paths))}: mark its place by lines {mark} and "
            "<!-- end -->"
        )
    for path, text in written.items():
        with output_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(written)


def _with_tables(results: Results, page: Path) -> str | None:
    """The text of a page with the tables of the study, None if it has no mark of the study."""
    study, text = results.seeds[0]["study"], read_text(page)
    marks = MARK.findall(text)
    for name, _ in marks:
        if name not in TABLES:
            raise ValmError(f"{page} has the mark of a table {name!r}, expected one of {', '.join(TABLES)}")
    if study not in (of for _, of in marks):
        return None
    tables = {name: TABLES[name](results) for name, of in marks if of == study}

    def filled(mark: re.Match) -> str:
        name, of = mark.groups()
        return f"<!-- study: {name} of {of} -->\n{tables[name]}\n<!-- end -->" if of == study else mark[0]

    return MARK.sub(filled, text)


def write_figure(results: Results, images: str | os.PathLike) -> None:
    """Writes the figure of the study into the folder `images`."""
    with atomic_path(writable_folder(images) / f"study-{results.seeds[0]['study']}.png") as temporary:
        figure_of_curve(results).savefig(temporary, dpi=110, format="png", bbox_inches="tight")


def state(results: Results) -> str:
    """The seeds, their settings, machine and versions, and the sets that were missing."""
    first = results.seeds[0]

    def words_of(version: str) -> str:
        return " ".join(dict.fromkeys(word for seed in results.seeds for word in seed["versions"][version].split()))

    machines = " and ".join(dict.fromkeys(seed["hardware"] for seed in results.seeds))
    interim = "" if len(results.seeds) >= SEEDS else f" **Interim: the plan decides with {SEEDS} seeds.**"
    versions = ", ".join(f"{name} {words_of(name)}" for name in first["versions"])
    missing = ""
    for of in dict.fromkeys(name for seed in results.seeds for name in seed["missing"]):
        seeds = [str(seed["seed"]) for seed in results.seeds if of in seed["missing"]]
        title = set_title(of) if of in SETS else of
        missing += f"\n\nNot asked, because the machine had no such file: {title} (seeds {', '.join(seeds)})."
    return (
        f"Seeds {', '.join(map(str, results.numbers))}.{interim} Settings `{first['recipe']}` of the study "
        f"`{first['study']}`. Machine: {machines}; threads: {first['threads']}. Versions: {versions}.{missing}"
    )


def answers(results: Results) -> str:
    """Correct answers of every arm, and its perplexity on captions."""
    asked = (VALIDATION_OBJECTS, WITH_PICTURE, WITHOUT_PICTURE, ALL_OF_VICOMTE)
    rows = []
    for arm in ARMS:
        if arm in results.arms:
            read = BASE if arm == PROMPT else arm  # captions are read as they are
            captions = perplexity_ratio(results, read, BASE, CAPTIONS_KIND)
            numbers = [raw_and_calibrated(results, arm, items) for items in asked]
            rows.append([arm_title(arm), *numbers, cell(captions, times, results)])
    measures = "%, uncalibrated / calibrated"
    heads = ["Model", *(f"{items.title}, {measures}" for items in asked), "captions, perplexity ÷ base model [95 %]"]
    return table(heads, rows)


def curve(results: Results) -> str:
    """VaLM and the query control by steps of training, and the mean of their differences."""
    asked = (VALIDATION_OBJECTS, ALL_OF_PEOPLE)
    rows = []
    control = results.curve(CONTROL[0])
    for steps, arm in results.curve(VALM[0]).items():
        row = [str(steps)]
        for items in asked:
            both = [results.accuracy(one, items.of) for one in (arm, control[steps])]
            row += [cell(one, _percent, results) for one in both]
            row.append(cell(results.difference(arm, control[steps], items.of), points, results))
        rows.append(row)
    if not rows:
        return "The study has no curve."
    means = [["–", "–", cell(learned(results, items), points, results)] for items in asked]
    rows.append(["mean", *(text for mean in means for text in mean)])
    columns = ("VaLM, %", "query control, %", "difference in points [95 %]")
    return table(["Steps", *(f"{items.title}: {column}" for items in asked for column in columns)], rows)


def _percent(found: Found) -> str:
    return f"{100 * found.value:.1f}"


def secondary(results: Results) -> str:
    """VaLM compared with other arms on all sets, and its perplexity on text."""
    rows = []
    for items in SECONDARY:
        for measure in MEASURES:
            found = [results.difference(VALM, other, items.of, measure, items.keep) for other in OTHERS.values()]
            if any(found) and (measure != APART or items.keep is not every):
                rows.append([f"{items.title}, {MEASURES[measure]}", *(cell(one, decided, results) for one in found)])
    for text in TEXTS:
        ratios = [perplexity_ratio(results, VALM, other, text) for other in OTHERS.values()]
        rows.append([f"{text}, perplexity ÷ the other model [95 %]", *(cell(one, times, results) for one in ratios)])
    head = f"{arm_title(VALM)}, difference in points [95 %]"
    return table([head, *(f"compared with {other}" for other in OTHERS)], rows)


def summary(results: Results) -> str:
    """The README's table: VaLM compared with the base, the query control and colours in the prompt."""
    asked = (*with_and_without(ALL_OF_PEOPLE), ALL_OF_PEOPLE)
    rows = []
    for other in SUMMARIZED:
        for measure in (RAW, CALIBRATED):
            found = [results.difference(VALM, OTHERS[other], items.of, measure, items.keep) for items in asked]
            rows.append([f"{other}, {MEASURES[measure]}", *(cell(one, points, results) for one in found)])
    groups = ("objects with a picture", "objects without a picture", "all objects")
    return table(["VaLM minus …, points [95 %]", *groups], rows)


def exchanged(results: Results) -> str:
    """How often VaLM follows replaced images."""
    asked = (ALL_OF_PEOPLE, VALIDATION_OBJECTS)
    rows = [
        [title, *(cell(follows(results, items, exchange), decided, results) for items in asked)]
        for exchange, title in EXCHANGE_TITLES.items()
    ]
    return table(["Images replaced by", *(f"{items.title}, points [95 %]" for items in asked)], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "state": state,
    "answers": answers,
    "claims": claims,
    "curve": curve,
    "secondary": secondary,
    "summary": summary,
    "exchanged": exchanged,
}
