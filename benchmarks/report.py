"""The measured figures of README.md and docs/, from the files in benchmarks/results/: none is typed by hand. The table
of back ends is asked of the package.

    python -m benchmarks.report

writes the plots, and on the pages what stands between the marks

    <!-- NAME: python -m benchmarks.report -->
    <!-- end -->

A test compares the pages with the results.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import gpu_report
from benchmarks.valm import demo_report, queries_report
from benchmarks.valm_kernels import back_ends, topk_report
from studies.plots import INK, SERIES, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "results" / "benchmarks.md"
README = ROOT / "README.md"
QUERIES = ROOT / "docs" / "results" / "queries.md"
SOURCE = "https://github.com/valm-kernels/valm/blob/main"
TOPK = ROOT / "docs" / "reference" / "topk.md"
DEMO = ROOT / "docs" / "results" / "demo.md"
KERNELS = ROOT / "docs" / "templates" / "valm_kernels.md"


@dataclass(frozen=True)
class Comparison:
    """A row of the table of speed: `ours` compared with `peer`, two rows of one group of a file of results.

    in_readme: the README shows the row too; docs/results/benchmarks.md shows all.
    """

    operation: str
    baseline: str
    file: str
    group: str
    ours: str
    peer: str
    in_readme: bool = True


XEON = "cpu-xeon-2-cores.csv"
EPYC = "cpu-epyc-2-cores.csv"
EPYC_TOPK = "topk-epyc-2-cores.csv"
EPYC_WHOLE = "whole-model-epyc-2-cores.csv"
EPYC_QUERIES = "query-dtype-epyc-2-cores.csv"
AMX_ATTENTION = "attention-xeon-amx-2-cores.csv"
AMX_TOPK = "topk-xeon-amx-2-cores.csv"
AMX_WHOLE = "whole-model-xeon-amx-2-cores.csv"
# What a file of results has, in the order of the page.
TITLES = {
    XEON: "All benchmarks, Intel Xeon",
    EPYC: "All benchmarks without `--full`, AMD EPYC",
    EPYC_TOPK: "Searches, AMD EPYC",
    EPYC_WHOLE: "The whole model, AMD EPYC",
    "memory-epyc-2-cores.csv": "A memory of the text, AMD EPYC",
    EPYC_QUERIES: "Precision of the queries, AMD EPYC",
    "retrieval-1m-cpu.csv": "Retrieval from a million images, AMD EPYC",
    AMX_ATTENTION: "Attention, Xeon with AMX",
    AMX_TOPK: "Searches, Xeon with AMX",
    AMX_WHOLE: "The whole model, Xeon with AMX",
}
# Of a machine's name: its short name (the first that fits), and what the `valm` command sets itself.
SHORT_NAMES = {"amx": "Xeon with AMX", "Xeon": "Xeon", "EPYC": "EPYC"}
MALLOC = re.compile(r" MALLOC_[^;]*;")
# What the plot of attention shows: ours is the line at 1.
ATTENTION = re.compile(r"(forward|forward \+ backward) B")
DRAWN = {
    "ours": INK,
    "text-only flash attention": SERIES[2],
    "flash + LSE merge": SERIES[0],
    "eager concat": SERIES[1],
    "FlexAttention, diagonal mask": SERIES[3],
}
BACKWARD = "forward + backward B4 H12 T1024 K8 D64"
SEARCH = "N 200k E 768 k 8 queries 64"
WHOLE = "whole model, 2 x 512 tokens, RN50x16 text tower, 1M pictures, k 4"
ATTENDED = "`visual_fusion_attn`, forward + backward, B4 H12 T1024 K8 D64"
SEARCHED = "`FlatIPIndex`, 64 queries, 200,000 vectors of 768 numbers, k 8"
MODEL = "VaLM, 2 × 512 tokens, 1 million images, K 4"
SAME_MODEL = "GPT-2 of the same size, no images"
SPEED = [
    Comparison(
        *(f"{ATTENDED}, dense, float32", "flash attention on the text only (lower bound)"),
        *(EPYC, f"{BACKWARD} float32", "ours", "text-only flash attention"),
    ),
    Comparison(
        *(f"{ATTENDED}, pooled, float32", "flash attention on the text only (lower bound)"),
        *(EPYC, f"{BACKWARD} float32", "ours, pooled", "text-only flash attention"),
        in_readme=False,
    ),
    Comparison(
        *(f"{ATTENDED}, dense, float32", "flash attention, images merged in PyTorch"),
        *(EPYC, f"{BACKWARD} float32", "ours", "flash + LSE merge"),
    ),
    Comparison(
        *(f"{ATTENDED}, dense, float32", "eager attention over concatenated keys"),
        *(EPYC, f"{BACKWARD} float32", "ours", "eager concat"),
    ),
    Comparison(
        *(f"{ATTENDED}, dense, bfloat16", "flash attention on the text only (lower bound)"),
        *(AMX_ATTENTION, f"{BACKWARD} bfloat16", "ours", "text-only flash attention"),
    ),
    Comparison(
        *(f"{ATTENDED}, pooled, bfloat16", "flash attention on the text only (lower bound)"),
        *(AMX_ATTENTION, f"{BACKWARD} bfloat16", "ours, pooled", "text-only flash attention"),
        in_readme=False,
    ),
    Comparison(
        *(f"{ATTENDED}, dense, bfloat16", "flash attention, images merged in PyTorch"),
        *(AMX_ATTENTION, f"{BACKWARD} bfloat16", "ours", "flash + LSE merge"),
        in_readme=False,
    ),
    Comparison(
        *(f"{ATTENDED}, dense, bfloat16", "eager attention over concatenated keys"),
        *(AMX_ATTENTION, f"{BACKWARD} bfloat16", "ours", "eager concat"),
        in_readme=False,
    ),
    Comparison(
        *(SEARCHED, "PyTorch: matrix product, then `topk`"),
        *(XEON, SEARCH, "FlatIPIndex", "torch float32 mm + topk"),
        in_readme=False,
    ),
    Comparison(
        *(SEARCHED, "faiss `IndexFlatIP`, tuned"),
        *(EPYC_TOPK, SEARCH, "FlatIPIndex", "faiss IndexFlatIP, tuned"),
    ),
    Comparison(
        *(f"{MODEL}, images retrieved beforehand", SAME_MODEL, EPYC_WHOLE, WHOLE, "VaLM, pictures given", "GPT-2*"),
    ),
    Comparison(
        *(f"{MODEL}, images retrieved live, int8 text encoder", SAME_MODEL),
        *(EPYC_WHOLE, WHOLE, "VaLM, eot, tower in int8", "GPT-2*"),
    ),
    Comparison(
        *(f"{MODEL}, images retrieved live, bfloat16 text encoder", SAME_MODEL),
        *(AMX_WHOLE, WHOLE, "VaLM, eot, tower in bfloat16", "GPT-2*"),
        in_readme=False,
    ),
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files_table() -> str:
    """The files of results, what each has, and where it was measured."""
    lines = ["| File | Rows | Machine |", "| --- | ---: | --- |"]
    for name, title in TITLES.items():
        rows = read(RESULTS / name)
        machines = dict.fromkeys(MALLOC.sub("", row["machine"]) for row in rows)
        link = f"[{title}]({SOURCE}/benchmarks/results/{name}), `{name}`"
        lines.append(f"| {link} | {len(rows)} | {'; '.join(machines)} |")
    return "\n".join(lines)


def speed_table(comparisons: Sequence[Comparison] = SPEED) -> str:
    """Medians, and time ÷ baseline, on the pages that show speed."""
    lines = [
        "| Operation | Machine | Time, ms | Baseline | Baseline, ms | Time ÷ baseline |",
        "| --- | --- | ---: | --- | ---: | ---: |",
    ]
    for row in comparisons:
        times = {one["name"]: float(one["median_ms"]) for one in read(RESULTS / row.file) if one["group"] == row.group}
        ours, peer = times[row.ours], times[row.peer]
        cells = (_short_name(_machine(row.file)), _milliseconds(ours), row.baseline, _milliseconds(peer))
        lines.append(f"| {' | '.join((row.operation, *cells, f'{ours / peer:.2f}'))} |")
    return "\n".join(lines)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def topk_table() -> str:
    """The machines and the tables of docs/reference/topk.md."""
    return "\n\n".join(f"{_machine(file)}:\n\n{topk_report.table(_searches(file))}" for file in (EPYC_TOPK, AMX_TOPK))


def queries_table() -> str:
    return queries_report.queries_table(RESULTS / EPYC_QUERIES)


def whole_table() -> str:
    """The machines and the table of whole models in docs/results/queries.md."""
    machines = {_machine(file): RESULTS / file for file in (EPYC_WHOLE, AMX_WHOLE)}
    named = "; ".join(f"{_short_name(machine)}: {machine}" for machine in machines)
    paths = {_short_name(machine): path for machine, path in machines.items()}
    return f"{named}.\n\n{queries_report.whole_table(paths)}"


def _machine(file: str) -> str:
    """The one that a file of results was measured on."""
    (machine,) = {MALLOC.sub("", row["machine"]) for row in read(RESULTS / file)}
    return machine


def _short_name(machine: str) -> str:
    return next(name for part, name in SHORT_NAMES.items() if part in machine)


def _searches(file: str) -> topk_report.Results:
    return topk_report.read(RESULTS / file)


MARKED: dict[str, Callable[[], str]] = {
    "benchmarks": speed_table,
    "speed": lambda: speed_table([row for row in SPEED if row.in_readme]),
    "files": files_table,
    "demo": lambda: demo_report.table(RESULTS / "demo.json"),
    "topk": topk_table,
    "queries": queries_table,
    "whole": whole_table,
    "back_ends": back_ends.table,
    **gpu_report.TABLES,
}


def pages() -> dict[Path, str]:
    """The pages as they should be."""
    paths = (README, DEMO, PAGE, TOPK, KERNELS, QUERIES, gpu_report.PAGE)
    return {path: gpu_report.fill(path.read_text(encoding="utf-8"), MARKED) for path in paths}


def attention_figure() -> Figure:
    """Of each case of attention, the time of the implementations over ours."""
    groups: dict[str, dict[str, float]] = {}
    for row in read(RESULTS / XEON):
        if ATTENTION.match(row["group"]) and row["name"] in DRAWN:
            groups.setdefault(row["group"], {})[row["name"]] = float(row["median_ms"])
    figure = new_figure(8.4, 3.6)
    axes = figure.subplots()
    for name, color in DRAWN.items():
        points = [(times[name] / times["ours"], place) for place, times in enumerate(groups.values()) if name in times]
        axes.plot(*zip(*points, strict=True), "o", color=color, label=name, markersize=7 if name == "ours" else 6)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time over ours")
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "attention.png": attention_figure,
    "topk.png": lambda: topk_report.figure(_searches(EPYC_TOPK)),
}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for name, draw in FIGURES.items():
        draw().savefig(IMAGES / name, dpi=150)


if __name__ == "__main__":
    main()
