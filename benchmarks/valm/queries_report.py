"""The tables of docs/results/queries.md, from the rows of bench_retrieval.py and bench_generation.py."""

from __future__ import annotations

import csv
from pathlib import Path

from valm.text import markdown_table

PRECISIONS = ("float32", "bfloat16", "int8")
# The baseline of a group: its name in the results, and in tables.
BASELINES = {"GPT-2 base forward float32": "GPT-2 base, one forward", "GPT-2*": "GPT-2\\* (no images)"}


def read(path: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    """For each group and name, the median and the minimum time ÷ that of the group's baseline."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            times = float(row["median_ms"]), float(row["min_ms"])
            groups.setdefault(row["group"], {})[row["name"]] = times
    return {group: _over_baseline(times) for group, times in groups.items()}


def queries_table(path: Path) -> str:
    """Context queries, and generation, in each precision; medians."""
    rows = []
    for group, times in read(path).items():
        baseline = BASELINES[_baseline(times)]
        if group.startswith("context queries"):
            for query in ("state", "eot", "published"):
                cells = (_median(times, f"{query} {one}") for one in PRECISIONS)
                rows.append((f"{group}: {query}", baseline, *cells))
        else:
            names = ("VaLM", "VaLM, tower in bfloat16", "VaLM, tower in int8")
            rows.append((group, baseline, *(_median(times, name) for name in names)))
    return markdown_table(("Operation", "Baseline", *(f"{one}, time ÷ baseline" for one in PRECISIONS)), rows)


def whole_table(paths: dict[str, Path]) -> str:
    """The whole model on each machine: medians, and minima in parentheses."""
    rows = []
    for machine, path in paths.items():
        for group, times in read(path).items():
            tower = group.split(", ")[2].removesuffix(" text tower")
            given = _both(times, "VaLM, pictures given")
            for query in ("state", "eot"):
                cells = (_both(times, f"VaLM, {query}, tower in {one}") for one in PRECISIONS)
                rows.append((machine, tower, f'`"{query}"`', given, *cells))
    ratios = (f"{one}, time ÷ GPT-2\\*" for one in ("images precomputed", *PRECISIONS))
    return markdown_table(("Machine", "Text encoder", "Query", *ratios), rows)


def _baseline(times: dict[str, tuple[float, ...]]) -> str:
    return next(name for name in BASELINES if name in times)


def _over_baseline(times: dict[str, tuple[float, float]]) -> dict[str, tuple[float, ...]]:
    baseline = times[_baseline(times)]
    return {name: tuple(ours / its for ours, its in zip(both, baseline, strict=True)) for name, both in times.items()}


def _median(times: dict[str, tuple[float, ...]], name: str) -> str:
    return f"{times[name][0]:.2f}" if name in times else ""


def _both(times: dict[str, tuple[float, ...]], name: str) -> str:
    median, minimum = times[name]
    return f"{median:.2f} ({minimum:.2f})"
