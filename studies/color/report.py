"""The tables and figures of docs/results/study.md, from the results of its seeds: no number there is typed by hand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from studies.color.comparisons import (
    BASE,
    CUT,
    MEASURES,
    PAIRS,
    PRIMARY,
    RANDOM_IMAGES,
    TWIN,
    VALM,
    arm_title,
    cell,
    percent,
    perplexity_ratio,
    points,
    points_and_p,
    retrieval_tests,
    set_title,
    table,
    tested,
    times,
)
from studies.color.config import ARMS, VALIDATION
from studies.color.figures import FIGURES
from studies.color.hypotheses import SEEDS, claims
from studies.color.results import Results, pictured, unpictured
from valm.errors import ValmError
from valm.evaluation.sets import SETS
from valm.store.files import output_file, read_text, writable_folder
from valm_kernels.atomic_files import atomic_path

# Pairs whose differences are shown seed by seed.
OF_EACH_SEED = (
    *("VaLM − twin", "VaLM − Blind", RANDOM_IMAGES, "VaLM with the cut − twin"),
    *("VaLM − captions in context", "VaLM − late fusion", "colourless VaLM − colourless Blind"),
)
MARK = re.compile(r"<!-- study: ([\w-]+) of ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def write_page(results: Results, page: str | os.PathLike, images: str | os.PathLike) -> None:
    """Writes the tables between the marks of `page`, and the figures study-STUDY-….png into `images`.

    A mark is `<!-- study: TABLE of STUDY -->`, and its table ends at `<!-- end -->`; those of other studies stay.

    Raises:
        ValmError: the page cannot be read, has a mark of no table, or none of this study.
    """
    path, folder = Path(page), writable_folder(images)
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
    for name, draw in FIGURES.items():
        with atomic_path(folder / f"study-{study}-{name}.png") as temporary:
            draw(results).savefig(temporary, dpi=110, format="png", bbox_inches="tight")


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


def summary(results: Results) -> str:
    """The table of the README: the primary measure and others of VaLM beside the twin and beside Blind, and with a base
    what images with the cut cost in ordinary text."""
    results = results.having((PRIMARY, VALM), (PRIMARY, TWIN))
    if not results.seeds:
        return "No seed has both models yet."
    pairs = ("VaLM − twin", "VaLM − Blind")
    planned = "" if len(results.seeds) >= SEEDS else f" of {SEEDS}"
    rows = []
    for what, of in (("MemoryColor", PRIMARY), ("things whose colour no text says", VALIDATION)):
        found = [results.difference(*PAIRS[pair], of) for pair in pairs]
        rows.append([f"right answers, {what}", *(cell(one, tested, results) for one in found)])
    follows = results.difference(("valm", "exchanged"), VALM, PRIMARY, "exchanged")
    if follows is not None:
        what = "answers that follow when the images' red and blue are exchanged, MemoryColor"
        rows.append([what, cell(follows, tested, results), "the same: Blind sees no image"])
    if BASE in results.arms and CUT in results.arms:
        of_twin, of_base = (
            ", ".join(
                f"{text} {cell(one, times, results)}"
                for text in results.texts()
                if (one := perplexity_ratio(results, CUT, over, text))
            )
            for over in (TWIN, BASE)
        )
        rows.append(["perplexity with the cut (`min_score`), × the twin's", of_twin, f"× the base's: {of_base}"])
    return table([f"Points [95 %], seeds {', '.join(map(str, results.numbers))}{planned}", *pairs], rows)


def harm(results: Results) -> str:
    """What each arm costs in ordinary text: its perplexities over the base's and over the twin's."""
    asked = [(text, over) for text in results.texts() for over in (BASE, TWIN) if over in results.arms]
    rows = []
    for arm in results.arms:
        found = [perplexity_ratio(results, arm, over, text) for text, over in asked]
        if any(found):
            rows.append([arm_title(arm), *(cell(one, times, results) for one in found)])
    heads = [f"{text}, × the {ARMS[over[0]].title}'s" for text, over in asked]
    return table(["Perplexity [95 %]", *heads], rows)


def by_picture(results: Results) -> str:
    """The differences on the items that have a picture, and on those that have none."""
    rows = []
    for pair, arms in PAIRS.items():
        for of, measure in MEASURES:
            having, without = (results.difference(*arms, of, measure, keep) for keep in (pictured, unpictured))
            if without is None:  # as of validation things, which all have one
                continue
            seeds = cell(without, lambda _: "", results)
            numbers = [(one and [str(one.items), points(one)]) or ["0", "–"] for one in (having, without)]
            rows.append([pair, f"{set_title(of)}, {measure}{seeds}", *numbers[0], *numbers[1]])
    return table(["Points [95 %]", "Set", "Items with a picture", "", "Items without", ""], rows)


def trainings(results: Results) -> str:
    """Where each arm's training stopped, and how much of the base it was mixed with; a number for each seed."""
    rows = []
    for arm in dict.fromkeys(arm for seed in results.seeds for arm in seed["training"]):
        numbers = [seed["training"].get(arm, {}) for seed in results.seeds]
        forms = (("steps", ".0f"), ("base_share", ".3f"), ("eval_perplexity", ".1f"))
        cells = [", ".join(f"{one[name]:{form}}" for one in numbers if name in one) or "–" for name, form in forms]
        rows.append([ARMS[arm].title, *cells])
    return table(["Training", "best step", "share of the base", "perplexity on what was held out"], rows)


def differences(results: Results) -> str:
    """Every pair of arms on every measure; of one seed with the p-value."""
    pairs = {name: pair for name, pair in PAIRS.items() if set(pair) <= set(results.arms)}
    rows = [
        [
            f"{set_title(of)}, {measure}",
            *(cell(results.difference(*pair, of, measure), points_and_p, results) for pair in pairs.values()),
        ]
        for of, measure in MEASURES
        if (of, measure) in results.measures
    ]
    return table(["Points [95 %]", *pairs], rows)


def by_seed(results: Results) -> str:
    """The differences that most is said about, seed by seed, as an interval over few seeds is too narrow."""
    rows = []
    seeds = [results.of_seeds([number]) for number in results.numbers]
    for of in (PRIMARY, VALIDATION):
        for pair in OF_EACH_SEED:
            found = [seed.difference(*PAIRS[pair], of) for seed in seeds]
            values = ["–" if one is None else f"{100 * one.value:+.1f}".replace("-", "−") for one in found]
            if any(found):
                rows.append([f"{pair}, {set_title(of)}", *values])
    return table(["Points", *(f"seed {number}" for number in results.numbers)], rows)


def accuracies(results: Results) -> str:
    """Every arm, with everything that it saw when it was asked."""
    asked = [one for one in MEASURES if one in results.measures]
    rows = [
        [arm_title(arm), *(cell(results.accuracy(arm, *one), percent, results) for one in asked)]
        for arm in results.arms
    ]
    return table(["Accuracy in percent [95 %]", *(f"{set_title(of)}, {measure}" for of, measure in asked)], rows)


def retrieval(results: Results) -> str:
    """The tests that a model without a knowledge base cannot pass."""
    tests = retrieval_tests(results)
    rows = [[test.title, str(test.found.items), cell(test.found, points_and_p, results)] for test in tests]
    return table(["Test", "Things", "Points [95 %]"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "state": state,
    "summary": summary,
    "claims": claims,
    "harm": harm,
    "pictured": by_picture,
    "trainings": trainings,
    "differences": differences,
    "seedwise": by_seed,
    "accuracies": accuracies,
    "retrieval": retrieval,
}
