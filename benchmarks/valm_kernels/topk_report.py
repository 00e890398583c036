"""The table and the plot of docs/reference/topk.md, from the rows of bench_topk.py, for `python -m benchmarks.report`.

Times are the least of each row's rounds: what else ran on the machine can only add to them.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from studies.plots import INK, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, PACKING = "FlatIPIndex", "ip_topk, packs per call"
FAISS = ("faiss IndexFlatIP", "faiss IndexFlatIP, tuned", "faiss IndexFlatIPPanorama")
GROUP = re.compile(r"N (\d+)k E (\d+) k (\d+) queries (\d+)(?: mean cosine (0\.\d+))?( decaying)?$")
SIZES = {50: "50,000", 200: "200,000", 1000: "1,000,000"}
# Of the plot: the colour of each line; recall tells which of them may miss a row.
DRAWN = {
    OURS: INK,
    PACKING: SERIES[0],
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


# The cases of the table.
SHOWN = [
    *(Key(rows, queries) for rows in SIZES for queries in (1, 16, 64, 1024)),
    *(Key(200, 64, dim=512), Key(200, 64, k=32)),
    *(Key(200, queries, decaying=True) for queries in (1, 64)),
]
# The peers of the table, each the fastest of some searches.
PEERS = {
    "PyTorch": ("torch float32 mm + topk",),
    "faiss fp16": ("faiss fp16 quantizer",),
    "usearch": ("usearch exact",),
    "faiss exact": FAISS,
}
NOT_MEASURED = "–"
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


def table(results: Results) -> str:
    """A row for each of SHOWN: times of ours, and the time of FlatIPIndex divided by the time of each peer."""
    headers = ["Rows", "Queries", "E", "k", f"{OURS}, ms", "ip_topk, ms", *(f"Time ÷ {peer}" for peer in PEERS)]
    lines = [f"| {' | '.join(headers)} |", "|" + " ---: |" * len(headers)]
    for key in SHOWN:
        case = results[key]
        ours, packing = case[OURS].ms, case.get(PACKING)
        cells = [_ms(ours), NOT_MEASURED if packing is None else _ms(packing.ms)]
        for names in PEERS.values():
            fastest = min((case[name] for name in names if name in case), default=None)
            cells.append(NOT_MEASURED if fastest is None else f"{ours / fastest.ms:.2g}")
        lines.append(f"| {SIZES[key.rows]} | {key.queries:,} | {_dim(key)} | {key.k} | {' | '.join(cells)} |")
    ratios = [case[OURS].ms / results[key._replace(cosine=0.0)][OURS].ms for key, case in results.items() if key.cosine]
    lines += ["", f"Over rows that share a direction (mean cosine 0.55 and 0.8) a search takes {min(ratios):.2f} to "]
    lines[-1] += f"{max(ratios):.2f} times as long."
    return "\n".join(lines)


def _dim(key: Key) -> str:
    return f"{key.dim}, decaying" if key.decaying else f"{key.dim}"


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
