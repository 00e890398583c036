"""Which held-out paragraphs of prose stand in the training text of the published seeds too.

Those seeds drew from Python's documentation with the paragraphs that stand in several of its topics. The split of a
seed depends on nothing but the seed and that documentation, so it can be drawn again:

python3.11 -m studies.color.leaks        # Python 3.11.7; writes studies/results/prose-in-training.json anew

The report leaves these paragraphs out (`without_leaks`).
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from studies.color.results import Results
from studies.color.text import held_out, topic_paragraphs
from valm.errors import ValmError
from valm.store.files import Count, read_json, write_json

FILE = Path(__file__).parents[1] / "results" / "prose-in-training.json"
# Of small.yaml, of which the first two were given up, and of full.yaml.
RECIPES = ("4384b4f23102", "31ab5beab621", "4662a04051dc", "5b7ec61430fe")
SEEDS = range(10)
PYTHON = "3.11.7"  # whose documentation they read
COUNT = 260  # `count` of the prose in their settings


class _Known(TypedDict):
    """The places of the leaked paragraphs by their seed."""

    recipes: list[str]
    python: str
    prose: dict[str, list[Count]]


def split(seed: int) -> tuple[list[str], list[str]]:
    """The paragraphs that a published seed was trained on, and those that were held out, in the order of its results.

    Raises:
        ValmError: this Python has another documentation.
    """
    if platform.python_version() != PYTHON:
        raise ValmError(
            f"the published seeds read the documentation of Python {PYTHON}, not {platform.python_version()}"
        )
    some, held = held_out(topic_paragraphs(), f"{seed} prose")
    return some[:COUNT], held


def leaked(seed: int) -> list[int]:
    """The places of the held-out paragraphs that are training text too.

    Raises:
        ValmError: see `split`.
    """
    trained, held = split(seed)
    return [place for place, text in enumerate(held) if text in set(trained)]


def without_leaks(results: Results) -> Results:
    """The results without the leaked paragraphs; `leaked` of a seed is their number and that of all."""
    known = read_json(FILE, "the leaked paragraphs", _Known, "run `python -m studies.color.leaks`")
    return Results(tuple(_clean(seed, known) for seed in results.seeds))


def _clean(seed: dict[str, Any], known: _Known) -> dict[str, Any]:
    places = known["prose"].get(str(seed["seed"]), [])
    if seed["recipe"] not in known["recipes"] or not places:
        return seed
    rows, counts = [], set()
    for row in seed["rows"]:
        if row.get("text") == "prose":
            counts.add(len(row["tokens"]))
            kept = sorted(set(range(len(row["tokens"]))) - set(places))
            row = row | {name: [row[name][place] for place in kept] for name in ("nats", "tokens")}
        rows.append(row)
    return seed | {"rows": rows, "leaked": (len(places), *counts)}


def main() -> None:
    prose = {str(seed): leaked(seed) for seed in SEEDS}
    write_json(FILE, {"recipes": RECIPES, "python": PYTHON, "prose": prose}, indent=None)
    print(f"written to {FILE}")


if __name__ == "__main__":
    main()
