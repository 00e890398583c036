"""The tables of docs/results/gpu.md: what `make gpu-check` measured (benchmarks/results/gpu.csv), and a roofline."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.valm_kernels import roofline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.csv"
PAGE = ROOT / "docs" / "results" / "gpu.md"
# The group of the rows that say how each step of gpu-check ended.
STEPS = "make gpu-check"
NOT_YET = "not measured yet"

Rows = list[dict[str, str]]

# What stands between such a mark and the next end is written from the results.
MARK = re.compile(r"(<!-- ([\w-]+): python -m benchmarks\.report -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Aim:
    """An aim of the page: the largest ratio allowed, and the measured one."""

    text: str
    most: float
    ratio: Callable[[Rows], float | None]


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with each table at its mark."""
    return MARK.sub(lambda mark: f"{mark[1]}{tables[mark[2]]()}\n", text)


def page() -> str:
    """docs/results/gpu.md as it should be, also before a GPU has run."""
    return fill(PAGE.read_text(encoding="utf-8"), TABLES)


def read() -> Rows:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def measured() -> str:
    """The machine, the steps and the benchmarks, once a GPU has run them."""
    machines = dict.fromkeys(row["machine"] for row in read())
    if not machines:
        return "**No GPU has run it yet.**"
    return "\n\n".join((*(f"Measured on {machine}." for machine in machines), steps(), benchmarks()))


def steps() -> str:
    rows = [
        (row["name"], row["note"], f"{float(row['median_ms']) / 1e3:.0f}") for row in read() if row["group"] == STEPS
    ]
    return _table(("Step", "Result", "Time, s"), rows or [("all", NOT_YET, "")])


def benchmarks() -> str:
    """A table: a row for each implementation of each case."""
    times = ("Call, ms", "GPU, ms", "GPU ÷ first row", "Predicted, ms", "GPU ÷ predicted")
    group, first, rows = None, "", []
    for row in read():
        if row["group"] == STEPS:
            continue
        case = "" if row["group"] == group else row["group"]
        if case:
            group, first = case, row["gpu_ms"]
        gpu, least = row["gpu_ms"], row["arithmetic_ms"]
        numbers = [row["median_ms"], gpu, _ratio(gpu, first), least, _ratio(gpu, least), row["peak_mb"]]
        cells = [case, row["name"], *numbers, row["note"]]
        rows.append([cell.replace("*", "\\*").replace("|", "/") for cell in cells])
    return _table(("Case", "Implementation", *times, "Peak memory, MB", "Note"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _ratio(time: str, other: str) -> str:
    return f"{float(time) / float(other):.2f}" if time and other else ""


def aims() -> str:
    ratios = [(aim, aim.ratio(read())) for aim in AIMS]
    rows = [(aim.text, f"{aim.most:.1f}", NOT_YET if ratio is None else f"{ratio:.2f}") for aim, ratio in ratios]
    return _table(("Operation; baseline", "Time ÷ baseline, at most", "Time ÷ baseline, measured"), rows)


def _times(rows: Rows, group: str, column: str = "gpu_ms") -> dict[str, float]:
    """Milliseconds by implementation."""
    return {row["name"]: float(row[column]) for row in rows if row["group"] == group and row[column]}


def _over_flash_and_image_bytes(rows: Rows) -> float | None:
    times = _times(rows, "forward B4 H12 T1024 K8 D64 bfloat16")
    if not {"ours", "text-only flash attention"} <= times.keys():
        return None
    image_ms = 1e3 * 2 * roofline.SHAPES[0].image_bytes / roofline.BYTES_PER_S
    return times["ours"] / (times["text-only flash attention"] + image_ms)


def _over_flash_merge(rows: Rows) -> float | None:
    times = _times(rows, "forward B8 H32/8 T4096 K4 D128 bfloat16")
    if not {"ours", "flash + LSE merge"} <= times.keys():
        return None
    return times["ours"] / times["flash + LSE merge"]


def _over_paper_and_host(rows: Rows) -> float | None:
    times = _times(rows, "decode B1 H12 T1 prefix 8191 K8 D64 bfloat16", "median_ms")
    if "ours" not in times:
        return None
    (decoding,) = (shape for shape in roofline.SHAPES if shape.Tq == 1)
    gpu = roofline.gpu_s(roofline.forward_works(decoding))
    return times["ours"] / (1e3 * (gpu + roofline.host_s(decoding, backward=False)))


AIMS = (
    Aim("Forward, T 1024; flash attention on the text plus the images' bytes", 1.3, _over_flash_and_image_bytes),
    Aim("Forward, T 4096, D 128; flash attention merged with the images in PyTorch", 1.0, _over_flash_merge),
    Aim("Decoding step, whole call; its time on paper below, plus our host's", 1.2, _over_paper_and_host),
)
# By their marks in the page.
TABLES: dict[str, Callable[[], str]] = {
    "gpu": measured,
    "aims": aims,
    "roofline": roofline.table,
}
