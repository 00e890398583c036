"""The tables of docs/results/queries.md, from the rows of bench_retrieval.py and bench_generation.py."""

from __future__ import annotations

import csv
from pathlib import Path

from valm.text import markdown_table

PRECISIONS = ("float32", "bfloat16", "int8")
# For each group of a file, its baseline.
TWINS = ("GPT-2 base forward float32", "GPT-2*")


def read(path: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    """For each group and name, the median and the least time ÷ the time of the group's baseline."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            times = float(row["median_ms"]), float(row["min_ms"])
            groups.setdefault(row["group"], {})[row["name"]] = times
    return {group: _over_twin(times) for group, times in groups.items()}


def queries_table(path: Path) -> str:
    """Context queries, and generation, in each precision; medians."""
    rows = []
    for group, times in read(path).items():
        if group.startswith("context queries"):
            for query in ("state", "eot", "published"):
                rows.append((f"{group}: {query}", *(_medians(times, f"{query} {one}") for one in PRECISIONS)))
        else:
            names = ("VaLM", "VaLM, tower in bfloat16", "VaLM, tower in int8")
            rows.append((group, *(_medians(times, name) for name in names)))
    return markdown_table(("", *PRECISIONS), rows)


def whole_table(paths: dict[str, Path]) -> str:
    """The whole model on each machine: medians, then least times."""
    rows = []
    for machine, path in paths.items():
        for group, times in read(path).items():
            tower = group.split(", ")[2].removesuffix(" text tower")
            given = _both(times, "VaLM, pictures given")
            for query in ("state", "eot"):
                cells = (_both(times, f"VaLM, {query}, tower in {one}") for one in PRECISIONS)
                rows.append((machine, tower, f'`"{query}"`', given, *cells))
    return markdown_table(("On", "Text tower", "Query", "images given", *PRECISIONS), rows)


def _over_twin(times: dict[str, tuple[float, float]]) -> dict[str, tuple[float, ...]]:
    twin = next(times[name] for name in TWINS if name in times)
    return {name: tuple(ours / its for ours, its in zip(both, twin, strict=True)) for name, both in times.items()}


def _medians(times: dict[str, tuple[float, ...]], name: str) -> str:
    return f"{times[name][0]:.2f}" if name in times else ""


def _both(times: dict[str, tuple[float, ...]], name: str) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in times[name])
