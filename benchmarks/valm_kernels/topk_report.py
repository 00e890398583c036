"""The tables and the plot of docs/results/topk.md, from the rows of bench_topk.py, for `python -m benchmarks.report`.

Times are the least of each row's rounds: what else ran on the machine can only add to them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from studies.plots import INK, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "FlatIPIndex"
FAISS = ("faiss IndexFlatIP", "faiss IndexFlatIP, tuned", "faiss IndexFlatIPPanorama")
GROUP = re.compile(r"N (\d+)k E (\d+) k (\d+) queries (\d+)(?: mean cosine (0\.\d+))?( decaying)?$")
SIZES = {50: "50,000", 200: "200,000", 1000: "1,000,000"}
# Of the plot: the colour of each line; recall tells which of them may miss a row.
DRAWN = {
    OURS: INK,
    "ip_topk, packs per call": SERIES[0],
    "torch bfloat16 mm + topk": SERIES[1],
    "torch float32 mm + topk": "#e6b08a",
    "faiss IndexFlatIP": "#a9c99f",
    "faiss IndexFlatIP, tuned": SERIES[2],
    "faiss IndexFlatIPPanorama": "#7a9e6c",
    "faiss fp16 quantizer": SERIES[3],
    "usearch exact": "#c9b3d9",
}


class Key(NamedTuple):
    """A case, its rows N in thousands."""

    rows: int
    queries: int
    dim: int = 768
    k: int = 8
    cosine: float = 0.0
    decaying: bool = False


class Measured(NamedTuple):
    ms: float
    recall: float


Results = dict[Key, dict[str, Measured]]


def read(path: Path) -> Results:
    """The searches among the rows of a benchmark's CSV file, by case and implementation."""
    results: Results = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            match = GROUP.match(row["group"])
            if match:
                rows, dim, k, queries = map(int, match.groups()[:4])
                key = Key(rows, queries, dim, k, float(match[5] or 0), match[6] is not None)
                recall = float(row["note"].removeprefix("recall "))
                results.setdefault(key, {})[row["name"]] = Measured(float(row["min_ms"]), recall)
    return results


def tables(results: Results) -> str:
    """One table for each size of the database, one of the other dims and k, one of other data."""
    parts = []
    for rows, words in SIZES.items():
        keys = sorted(key for key in results if key == Key(rows, key.queries))
        parts.append(f"N {words}, E 768, k 8\n\n{_table(results, keys, 'queries', lambda key: str(key.queries))}")
    keys = sorted(
        (key for key in results if (key.dim, key.k) != (768, 8)), key=lambda key: (key.dim, key.k, key.queries)
    )
    parts.append(
        "N 200,000, other sizes\n\n"
        + _table(results, keys, "sizes", lambda key: f"E {key.dim}, k {key.k}, {key.queries} queries")
    )
    keys = sorted(key for key in results if key.decaying)
    if keys:
        parts.append(
            "N 200,000, E 768, k 8, rows whose n-th principal axis has a share of 1 / n\n\n"
            + _table(results, keys, "queries", lambda key: str(key.queries))
        )
    lines = ["| queries | mean cosine 0 | 0.55 | 0.8 |", "| ---: | ---: | ---: | ---: |"]
    for queries in sorted({key.queries for key in results if key.cosine}):
        times = [results[Key(200, queries, cosine=cosine)][OURS].ms for cosine in (0.0, 0.55, 0.8)]
        lines.append(f"| {queries} | " + " | ".join(map(_ms, times)) + " |")
    parts.append(f"{OURS}, N 200,000, E 768, k 8, rows that share a direction\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _table(results: Results, keys: list[Key], title: str, name: Callable[[Key], str]) -> str:
    names = [name for name in DRAWN if any(name in results[key] for key in keys)]
    exact = [name for name in FAISS if name in names]  # older results have no Panorama
    lines = [
        f"| {title} | " + " | ".join(names) + f" | best of {', '.join(exact)} / ours |",
        "| ---: |" + " ---: |" * (len(names) + 1),
    ]
    for key in keys:
        case = results[key]
        cells = [_cell(case.get(name)) for name in names]
        best = min((case[name].ms for name in exact if name in case), default=None)
        cells.append("" if best is None else f"{best / case[OURS].ms:.1f}")
        lines.append(f"| {name(key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(measured: Measured | None) -> str:
    if measured is None:
        return ""
    return _ms(measured.ms) + (f" ({measured.recall:.3f})" if measured.recall < 1 else "")


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def figure(results: Results) -> Figure:
    """Time of one search against the number of its queries, one panel for each size of the database."""
    drawing = new_figure(9.6, 3.9)
    panels = drawing.subplots(1, len(SIZES), sharey=True)
    for axes, (rows, words) in zip(panels, SIZES.items(), strict=True):
        keys = sorted(key for key in results if key == Key(rows, key.queries))
        for name, color in DRAWN.items():
            points = [(key.queries, results[key][name].ms) for key in keys if name in results[key]]
            if not points:  # measured before it was a peer
                continue
            recall = min(results[key][name].recall for key in keys if name in results[key])
            label = name + (f" (recall {recall:.2f})" if recall < 1 else "")
            width = 2.6 if name == OURS else 1.3
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, marker="o", markersize=3, label=label)
        axes.set_title(f"{words} rows", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, 16, 64, 256, 1024, 4096], ["1", "16", "64", "256", "1024", "4096"], fontsize=8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("queries in one search")
        axes.grid(color="#e6e8eb", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return drawing
