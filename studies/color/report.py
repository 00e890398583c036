"""The tables and the figure of docs/results/study.md, from the results of seeds: no number is typed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.color.comparisons import (
    ALL_OF_PRIMARY,
    ALL_OF_VICOMTE,
    BASE,
    BLIND,
    CUT,
    IN_CONTEXT,
    MEASURES,
    OTHERS,
    RANDOM,
    READING,
    READING_BLIND,
    READING_BLIND_ALL,
    READING_RANDOM,
    SECONDARY,
    TWIN,
    VALIDATION_OBJECTS,
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
    studied,
    table,
    times,
)
from studies.color.config import COLORED_CAPTIONS, EXCHANGES
from studies.color.figures import dose
from studies.color.hypotheses import SEEDS, hypotheses
from studies.color.questions import CAPTIONS_KIND
from studies.color.results import APART, ArmTest, Results, every
from valm.errors import ValmError
from valm.evaluation.sets import SETS
from valm.store.files import output_file, read_text, writable_folder
from valm_kernels.atomic_files import atomic_path

MARK = re.compile(r"<!-- study: ([\w-]+) of ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
PAGES = ("docs/results/study.md", "studies/color/archive.md")
# The arms in the table of answers.
ARMS: tuple[ArmTest, ...] = (
    *(BASE, TWIN, VALM, CUT, RANDOM, BLIND, READING, READING_RANDOM, READING_BLIND, READING_BLIND_ALL),
    *(IN_CONTEXT, ("base", COLORED_CAPTIONS)),
)
# The kinds of text whose perplexity is compared.
TEXTS = ("glosses", "prose", CAPTIONS_KIND)

# The rows of a budget: a name in its file, and a title for K images per token.
BUDGET_ROWS = {
    "retrieved": "one of the {K} images of the token before the answer shows the object",
    "seen": "one of the {K} images shows the object, and the best score reaches the threshold: the token sees them",
    "own_above": "an image of the object is retrieved, and its own score reaches the threshold",
    "pixels": "the most frequent colour in the pixels of the {K} images is correct",
    "probe_of_best": "a linear probe of the best image's vector names the correct colour",
    "probe_of_mean": "a linear probe of the mean of the {K} vectors names the correct colour",
    "probe_of_mean_above": "a linear probe of the mean of the vectors above the threshold names the correct colour",
    "trained": "{arm}: the trained weights alone answer correctly",
    "mixed": "{arm}: the weights mixed with the base model's, as in the study, answer correctly",
    "colors_in_prompt": "{base}: answers correctly",
}


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
        dose(results).savefig(temporary, dpi=110, format="png", bbox_inches="tight")


def state(results: Results) -> str:
    """The seeds, their settings, machine and versions, and the sets that were missing."""
    first = results.seeds[0]
    interim = "" if len(results.seeds) >= SEEDS else f" **Interim: the plan decides with {SEEDS} seeds.**"
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    missing = ""
    for of in dict.fromkeys(name for seed in results.seeds for name in seed["missing"]):
        seeds = [str(seed["seed"]) for seed in results.seeds if of in seed["missing"]]
        title = set_title(of) if of in SETS else of
        missing += f"\n\nNot asked, because the machine had no such file: {title} (seeds {', '.join(seeds)})."
    return (
        f"Seeds {', '.join(map(str, results.numbers))}.{interim} Settings `{first['recipe']}` of the study "
        f"`{first['study']}`. Machine: {first['hardware']}; threads: {first['threads']}. Versions: {versions}.{missing}"
    )


def answers(results: Results) -> str:
    """Correct answers of every arm, and its perplexity on captions."""
    asked = (VALIDATION_OBJECTS, WITH_PICTURE, WITHOUT_PICTURE, ALL_OF_VICOMTE)
    rows = []
    for arm in ARMS:
        if arm in results.arms:
            read = (arm[0], "none") if arm[1] == COLORED_CAPTIONS else arm  # captions are read as they are
            captions = perplexity_ratio(results, read, BASE, CAPTIONS_KIND)
            numbers = [raw_and_calibrated(results, arm, items) for items in asked]
            rows.append([arm_title(arm), *numbers, cell(captions, times, results)])
    measures = "%, uncalibrated / calibrated"
    heads = ["Model", *(f"{items.title}, {measures}" for items in asked), "captions, perplexity ÷ base model [95 %]"]
    return table(heads, rows)


def secondary(results: Results) -> str:
    """The studied arm compared with other arms on all sets, and its perplexity on text."""
    rows, arm = [], studied(results)
    for items in SECONDARY:
        for measure in MEASURES:
            found = [results.difference(arm, other, items.of, measure, items.keep) for other in OTHERS[arm].values()]
            if any(found) and (measure != APART or items.keep is not every):
                rows.append([f"{items.title}, {MEASURES[measure]}", *(cell(one, decided, results) for one in found)])
    for text in TEXTS:
        ratios = [perplexity_ratio(results, arm, other, text) for other in OTHERS[arm].values()]
        rows.append([f"{text}, perplexity ÷ the other model [95 %]", *(cell(one, times, results) for one in ratios)])
    head = f"{arm_title(arm)}, difference in points [95 %]"
    return table([head, *(f"compared with {other}" for other in OTHERS[arm])], rows)


def exchanged(results: Results) -> str:
    """How often the studied arm follows replaced images."""
    rows = []
    for exchange, title in zip(
        EXCHANGES, ("same pictures, red and blue exchanged", "pictures of other objects in another colour"), strict=True
    ):
        found = [follows(results, items, exchange) for items in (ALL_OF_PRIMARY, VALIDATION_OBJECTS)]
        rows.append([title, *(cell(one, decided, results) for one in found)])
    sets = (f"{items.title}, points [95 %]" for items in (ALL_OF_PRIMARY, VALIDATION_OBJECTS))
    return table(["Images replaced by", *sets], rows)


def budget(results: Results) -> str:
    """Where a colour is lost before the answer, in the seeds whose budget is next to their results."""
    found = [seed["budget"] for seed in results.seeds if "budget" in seed]
    return budget_table(found) if found else "No seed has a budget."


def budget_table(budgets: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the budgets of one study, with a column for each seed."""
    first = budgets[0]
    arm, base = arm_title((first["arm"], "retrieved")), arm_title(("base", COLORED_CAPTIONS))
    heads = [f"seed {one['seed']}, % of {one['questions']:,} questions" for one in budgets]
    rows = []
    for row, title in BUDGET_ROWS.items():
        shares = [one["shares"][row] for one in budgets]
        if set(shares) != {None}:
            cells = ["–" if share is None else f"{100 * share:.1f}" for share in shares]
            rows.append([title.format(K=first["images"], arm=arm, base=base), *cells])
    return table(["Questions about validation objects", *heads], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "state": state,
    "answers": answers,
    "hypotheses": hypotheses,
    "secondary": secondary,
    "exchanged": exchanged,
    "budget": budget,
}
