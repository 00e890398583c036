"""docs/benchmarks.md, and the table of README.md, from the rows of benchmarks/results/.

    python -m benchmarks.report

writes both, so that no measured figure is typed by hand. A test compares them with the rows.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
# The lines of README.md between which the table stands.
BEGIN, END = "<!-- benchmarks: python -m benchmarks.report -->", "<!-- end of benchmarks -->"

# The parts of the page, in order: a title, and what the names of its groups begin with. The last takes all others.
PARTS = {
    "Attention: `visual_fusion_attn`": r"(forward|decode|image side|whole layer|8 packed|softcap)",
    "Exact top-K inner product: `FlatIPIndex`, `ip_topk`": r"(N \d+k|adversarial|one query|scores)",
    "Context queries, search and the whole model": "",
}

INTRODUCTION = """\
# Benchmarks

Every row was written by `pytest benchmarks/ --benchmark-only --results FILE.csv` on the machine that its section names;
`--full` adds the large sizes. A result is checked before it is timed. Ratios are of medians within one run: rows of two
sections cannot be compared. This page is written by `python -m benchmarks.report` from
[benchmarks/results/](https://github.com/valm-kernels/valm/tree/main/benchmarks/results).

**No GPU has been measured yet.** `make gpu-check` writes the rows of a card into the same folder.

The text towers of the retrieval rows have random weights, on which speed does not depend, and their knowledge base is
of perturbed context queries of real text (`benchmarks/valm/inputs.py`). [Exact top-K](topk.md) has its own page with a
plot and where it is slower.
"""


@dataclass(frozen=True)
class Ratio:
    """A row of README's table: `ours` of a group against `peer`, faster or as a multiple of its time."""

    what: str
    against: str
    group: str
    ours: str
    peer: str
    faster: bool


XEON = "cpu-xeon-2-cores.csv"
WHOLE = "whole model, 2 x 512 tokens, RN50x16 text tower, 1M pictures, k 4"
README_ROWS = [
    Ratio(
        "`visual_fusion_attn`, forward + backward, B4 H12 T1024 K8 D64",
        "flash attention over the text alone: the floor",
        "forward + backward B4 H12 T1024 K8 D64 float32",
        "ours",
        "text-only flash attention",
        False,
    ),
    Ratio(
        "the same",
        "flash attention joined with the images by log-sum-exp in PyTorch",
        "forward + backward B4 H12 T1024 K8 D64 float32",
        "ours",
        "flash + LSE merge",
        True,
    ),
    Ratio(
        "`FlatIPIndex`, 64 queries of 200k rows of 768, k 8",
        "faiss `IndexFlatIP`, tuned",
        "N 200k E 768 k 8 queries 64",
        "FlatIPIndex",
        "faiss IndexFlatIP, tuned",
        True,
    ),
    Ratio(
        '`"eot"` queries of 8 × 512 tokens, RN50x16-size tower',
        "the published code's way: overlapping blocks, encoded anew",
        "context queries, 8 x 512 tokens, RN50x16 text tower",
        "eot float32",
        "published float32",
        True,
    ),
    Ratio(
        "whole VaLM ¹, 1M images, K 4, images given (`valm retrieve`)",
        "GPT-2\\*, the same model without images",
        WHOLE,
        "VaLM, pictures given",
        "GPT-2*",
        False,
    ),
    Ratio(
        "the same ¹, images retrieved as it reads (approximate index)",
        "the same",
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
    """docs/benchmarks.md."""
    return "\n".join([INTRODUCTION, *(section(path) for path in sorted(RESULTS.glob("*.csv")))])


def section(path: Path) -> str:
    """The rows of one file: a table for each of PARTS."""
    rows = read(path)
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    lines = [f"## {path.name}", "", *(f"{machine}\n" for machine in machines)]
    left = rows
    for title, begin in PARTS.items():
        part = [row for row in left if re.match(begin, row["group"])]
        left = [row for row in left if row not in part]
        if part:
            lines += [f"### {title}", "", *table(part), ""]
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
    """The table of README.md."""
    machine = read(RESULTS / XEON)[0]["machine"]
    lines = [f"{machine}; float32:", "", "| | Against | |", "| --- | --- | --- |"]
    for ratio in README_ROWS:
        times = {row["name"]: float(row["median_ms"]) for row in read(RESULTS / XEON) if row["group"] == ratio.group}
        ours, peer = times[ratio.ours], times[ratio.peer]
        result = f"{peer / ours:.1f} × faster" if ratio.faster else f"{ours / peer:.2f} × its time"
        lines.append(f"| {ratio.what} | {ratio.against} | {result} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """README.md with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
