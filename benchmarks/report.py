"""The measured figures of README.md and docs/, from the files in benchmarks/results/: none is typed by hand.

    python -m benchmarks.report

writes docs/results/{benchmarks,gpu}.md and their plots, and on other pages what stands between the marks

    <!-- NAME: python -m benchmarks.report -->
    <!-- end -->

A test compares the pages with the results.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import gpu_report
from benchmarks.valm import demo_report
from benchmarks.valm_kernels import topk_report
from studies.plots import INK, SERIES, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "results" / "benchmarks.md"
README = ROOT / "README.md"
TOPK = ROOT / "docs" / "results" / "topk.md"

# The parts of a file's rows, in order: a title, and what the names of its groups begin with. The last takes all others.
PARTS = {
    "Attention: visual_fusion_attn": r"(forward|decode|image side|whole layer|8 packed|softcap)",
    "Exact top-K inner product: FlatIPIndex, ip_topk": r"(N \d+k|adversarial|one query|scores)",
    "A memory of the text: ip_topk over heads, visual_fusion_attn": r"(\d+ of \d+ keys|a memory of)",
    "Context queries, search and the whole model": "",
}

INTRODUCTION = """\
# Benchmarks

Each operation beside what one would use otherwise, on CPUs. [On a GPU](gpu.md) has what `make gpu-check` measures.

## Summary
"""

FIGURES_AND_METHOD = """\
![Time of each implementation of attention over that of visual_fusion_attn](../images/attention.png)

*`cpu-xeon-2-cores.csv`. The same for the time of a search; [Search times](topk.md) says where it is slower:*

![Time of a search against the number of its queries, for 50,000, 200,000 and 1,000,000 rows](../images/topk.png)

*`topk-epyc-2-cores.csv`.*

## How it is measured

`pytest benchmarks/ --benchmark-only` takes a few minutes; `--full` adds the large sizes. Every row was written by

```
for f in benchmarks/*/bench_*.py; do pytest $f --benchmark-only --full --results FILE.csv; done
```

or a part of that, on the machine that stands above it. MALLOC_ variables there are those that the `valm` command sets
itself. A result is checked before it is timed. Ratios are of medians in one run; do not compare rows of two files.
`python -m benchmarks.report` writes this page from
[the result files](https://github.com/valm-kernels/valm/tree/main/benchmarks/results).

The text towers of the retrieval rows have random weights, on which speed does not depend, and their knowledge base is
of perturbed context queries of real text (`benchmarks/valm/inputs.py`).

## Huge pages

The codes of a search and dense gradients of images lie on huge pages, where Linux grants them. Other tensors do with
PyTorch's `THP_MEM_ALLOC_ENABLE=1` and `madvise` or `always` in `/sys/kernel/mm/transparent_hugepage/enabled`. Two
cores of an AMD EPYC, 2026-11-29, B4 H12 T1024 K8 D64, dense, two runs of each in turn (`pytest
benchmarks/valm_kernels/bench_visual_fusion.py --benchmark-only -k "B4 and ours and not pooled"`):

| ms | medians, without | with | least, without | with |
| --- | --- | --- | --- | --- |
| forward, float32 | 71.3, 74.5 | 74.9, 72.2 | 70.2, 71.5 | 72.5, 70.5 |
| forward, bfloat16 | 82.7, 74.6 | 71.1, 71.5 | 71.9, 70.5 | 70.4, 70.7 |
| forward + backward, float32 | 262, 301 | 258, 254 | 252, 271 | 251, 251 |
| forward + backward, bfloat16 | 211, 226 | 208, 213 | 205, 208 | 204, 205 |

The least times hardly change there; slow runs are rarer.

## All rows
"""


@dataclass(frozen=True)
class Ratio:
    """A row of README's table: `ours` of a group of a file against `peer`, faster or as a multiple of its time."""

    what: str
    against: str
    file: str
    group: str
    ours: str
    peer: str
    faster: bool


XEON = "cpu-xeon-2-cores.csv"
EPYC_TOPK = "topk-epyc-2-cores.csv"
EPYC_WHOLE = "whole-model-epyc-2-cores.csv"
# What a file of results has, and where it was measured; a file without a title has its name.
TITLES = {
    XEON: "All benchmarks, Intel Xeon",
    "cpu-epyc-2-cores.csv": "All benchmarks without `--full`, AMD EPYC",
    EPYC_TOPK: "Searches, AMD EPYC",
    EPYC_WHOLE: "The whole model, AMD EPYC",
    "memory-epyc-2-cores.csv": "A memory of the text, AMD EPYC",
    "query-dtype-epyc-2-cores.csv": "Precision of the queries, AMD EPYC",
    "retrieval-1m-cpu.csv": "Retrieval from a million images, AMD EPYC",
}
# What the plot of attention shows: ours is the line at 1.
ATTENTION = re.compile(r"(forward|forward \+ backward) B")
DRAWN = {
    "ours": INK,
    "text-only flash attention": SERIES[2],
    "flash + LSE merge": SERIES[0],
    "eager concat": SERIES[1],
    "FlexAttention, diagonal mask": SERIES[3],
}
WHOLE = "whole model, 2 x 512 tokens, RN50x16 text tower, 1M pictures, k 4"
README_ROWS = [
    Ratio(
        "`visual_fusion_attn`, forward + backward, B4 H12 T1024 K8 D64",
        "flash attention over the text alone: the floor",
        XEON,
        "forward + backward B4 H12 T1024 K8 D64 float32",
        "ours",
        "text-only flash attention",
        False,
    ),
    Ratio(
        "the same",
        "flash attention joined with the images in PyTorch",
        XEON,
        "forward + backward B4 H12 T1024 K8 D64 float32",
        "ours",
        "flash + LSE merge",
        True,
    ),
    Ratio(
        "the same in bfloat16",
        "the same",
        XEON,
        "forward + backward B4 H12 T1024 K8 D64 bfloat16",
        "ours",
        "flash + LSE merge",
        True,
    ),
    Ratio(
        "`FlatIPIndex`, 64 queries of 200k rows of 768, k 8",
        "PyTorch: product + `topk`, the fastest exact peer there",
        XEON,
        "N 200k E 768 k 8 queries 64",
        "FlatIPIndex",
        "torch float32 mm + topk",
        True,
    ),
    Ratio(
        "the same",
        "faiss `IndexFlatIP`, tuned, the fastest exact peer there",
        EPYC_TOPK,
        "N 200k E 768 k 8 queries 64",
        "FlatIPIndex",
        "faiss IndexFlatIP, tuned",
        True,
    ),
    Ratio(
        "VaLM, 1M images, K 4, RN50x16-size tower, images retrieved before (`valm retrieve`)",
        "GPT-2\\*, the same model without images",
        EPYC_WHOLE,
        WHOLE,
        "VaLM, pictures given",
        "GPT-2*",
        False,
    ),
    Ratio(
        "the same, images retrieved as it reads, text tower in int8 (`--query-dtype int8`)",
        "the same",
        EPYC_WHOLE,
        WHOLE,
        "VaLM, eot, tower in int8",
        "GPT-2*",
        False,
    ),
    Ratio(
        "the same, text tower in float32 (the default)",
        "the same",
        EPYC_WHOLE,
        WHOLE,
        "VaLM, eot, tower in float32",
        "GPT-2*",
        False,
    ),
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def page() -> str:
    """docs/results/benchmarks.md: a summary first, and all rows folded."""
    files = sorted({*RESULTS.glob("*.csv")} - {gpu_report.RESULTS}, key=_place)
    return "\n".join([INTRODUCTION, readme_table(), "", FIGURES_AND_METHOD, *(section(path) for path in files)])


def _place(path: Path) -> tuple[int, str]:
    titled = list(TITLES)
    return titled.index(path.name) if path.name in titled else len(titled), path.name


def section(path: Path) -> str:
    """The rows of one file: a table that unfolds for each of PARTS."""
    rows = read(path)
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    lines = [
        f"### {TITLES.get(path.name, path.name)}",
        "",
        f"`{path.name}`",
        "",
        *(f"- {machine}" for machine in machines),
        "",
    ]
    left = rows
    for title, begin in PARTS.items():
        part = [row for row in left if re.match(begin, row["group"])]
        left = [row for row in left if row not in part]
        if part:
            summary = f"<summary>{title} ({len(part)} rows)</summary>"
            lines += ["<details markdown>", summary, "", *table(part), "", "</details>", ""]
    return "\n".join(lines)


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    yield "| Case | Implementation | ms | × the first | peak MB | |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    group = None
    for row in rows:
        case = "" if row["group"] == group else row["group"]
        group = row["group"]
        cells = [case, row["name"], number(row["median_ms"]), f"{float(row['time_over_first']):.2f}", row["peak_mb"]]
        yield f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in cells)} | {row['note']} |"


def number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def readme_table() -> str:
    """The table of README.md: the name of each machine, then a row for each ratio."""
    rows = {file: read(RESULTS / file) for file in dict.fromkeys(ratio.file for ratio in README_ROWS)}
    machines = {file: re.sub(r" MALLOC_[^;]*;", "", lines[0]["machine"]) for file, lines in rows.items()}
    names = {file: next(name for name in ("Xeon", "EPYC") if name in machine) for file, machine in machines.items()}
    named = "; ".join(dict.fromkeys(f"{names[file]}: {machine}" for file, machine in machines.items()))
    lines = [
        f"{named}. Float32, unless another type is named.",
        "",
        "| | Against | | On |",
        "| --- | --- | --- | --- |",
    ]
    for ratio in README_ROWS:
        times = {row["name"]: float(row["median_ms"]) for row in rows[ratio.file] if row["group"] == ratio.group}
        ours, peer = times[ratio.ours], times[ratio.peer]
        result = f"{peer / ours:.1f} × faster" if ratio.faster else f"{ours / peer:.2f} × its time"
        lines.append(f"| {ratio.what} | {ratio.against} | {result} | {names[ratio.file]} |")
    return "\n".join(lines)


def topk_tables() -> str:
    """The machine and the tables of docs/results/topk.md."""
    (machine,) = {row["machine"] for row in read(RESULTS / EPYC_TOPK)}
    return f"{machine}:\n\n{topk_report.tables(topk_report.read(RESULTS / EPYC_TOPK))}"


MARKED: dict[str, Callable[[], str]] = {
    "benchmarks": readme_table,
    "demo": lambda: demo_report.table(RESULTS / "demo.json"),
    "topk": topk_tables,
}
MARK = re.compile(r"(<!-- ([\w-]+): python -m benchmarks\.report -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The pages as they should be."""
    marked = {path: path.read_text(encoding="utf-8") for path in (README, TOPK)}
    written = {path: MARK.sub(lambda mark: f"{mark[1]}{MARKED[mark[2]]()}\n", text) for path, text in marked.items()}
    return {PAGE: page(), gpu_report.PAGE: gpu_report.page(), **written}


def attention_figure() -> Figure:
    """Of each case of attention, the time of the implementations over ours."""
    groups: dict[str, dict[str, float]] = {}
    for row in read(RESULTS / XEON):
        if ATTENTION.match(row["group"]) and row["name"] in DRAWN:
            groups.setdefault(row["group"], {})[row["name"]] = float(row["time_over_first"])
    figure = new_figure(8.4, 3.6)
    axes = figure.subplots()
    for name, color in DRAWN.items():
        points = [(times[name], place) for place, times in enumerate(groups.values()) if name in times]
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
    "topk.png": lambda: topk_report.figure(topk_report.read(RESULTS / EPYC_TOPK)),
}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for name, draw in FIGURES.items():
        draw().savefig(IMAGES / name, dpi=150)


if __name__ == "__main__":
    main()
