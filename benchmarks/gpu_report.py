"""docs/results/gpu.md: what `make gpu-check` has measured on a card (benchmarks/results/gpu.csv), and a roofline."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
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

INTRODUCTION = """\
# On a GPU

`make gpu-check` does on a card, within ten minutes, what this project cannot do without one: it builds the native
module, runs the tests of the GPU code, measures the tiles of the Triton kernels and tests the fastest, runs the
benchmarks beside their peers, and a small set of the tests under compute-sanitizer. It writes
`benchmarks/results/gpu.csv`, `measured_tiles.json` and `measured_crossover.json` in `valm_kernels/visual_fusion`, and
this page.

The machine needs PyTorch 2.9 with CUDA, Triton 3.5, NumPy, packaging and pytest; nothing is installed, and no network
is used. What else is missing is listed at the start, and skipped with a reason: benchmarks need pytest-benchmark, the
model's also the packages that valm asks for, the native module needs setuptools and a C++ compiler, its CUDA part nvcc,
and rows of faiss-gpu (`valm[gpu]`, in the place of faiss-cpu), cuVS and FlashAttention-3 need these.

```
python -m benchmarks.gpu_check --dry-run             # the plan, its budgets and what it compiles; needs no card
make gpu-check PYTHON=python3                        # = python3 -m benchmarks.gpu_check
python -m benchmarks.gpu_check --results FOLDER      # keeps the results there, and goes on with those it finds
python -m benchmarks.gpu_check --results FOLDER --report    # on any machine: writes the files from the results
```

Each step has a budget of seconds. A step that is not done by then is stopped and noted, and the next begins; each row
and each test is written as soon as it is measured. Run it again, and it does what has not passed yet, and what has read
tiles that are others now. Results of other code or of another card are moved aside, and are back when that card is.
Where the machine is only lent, take the folder of the results away and use `--report` at home.

Measured tiles hold for the compute capability of their card, and take the place of the estimated ones in `tiles.py`
there. They are written only if the tests pass with them, and these launch every one. The crossover is the text length
from which on a forward and backward with PyTorch's own flash attention, to which a second kernel joins the images, was
faster than one kernel for both; on other cards `impl="auto"` goes by an estimate. It is written only if the tests of
flash attention pass. `VALM_KERNELS_TILES` and `VALM_KERNELS_CROSSOVER` name other such files.

A call's time is that of its host too, until the result is there. The GPU's own time is that of a CUDA graph of calls on
copies of the inputs, together twice the size of the L2 cache. "Arithmetic" is the least time that an H100 needs by
[the roofline](#roofline-of-an-h100), an estimate: bytes once over the memory bus, floating-point operations at the peak
of the tensor cores, nothing for launches and host.
"""

AMD = """\
## AMD

**Compiled, never run.** Triton also compiles the kernels of `visual_fusion_attn` for gfx942 (MI300), with tiles of
their own; `benchmarks/records/triton_compile.csv` has the compiler's figures. Products of float32 are computed in
float32 there, not in three of tf32.
"""


@dataclass(frozen=True)
class Aim:
    """An aim of the page: the largest ratio allowed, and the measured one."""

    text: str
    most: float
    ratio: Callable[[Rows], float | None]


def page() -> str:
    """The page, also before anything has been measured."""
    rows = read()
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    if not rows:
        measured = [f"**No card has run it yet: everything below is {NOT_YET}.**"]
    else:
        measured = [f"Measured on {machine}." for machine in machines]
    parts = [INTRODUCTION, *measured, "", "## Steps", "", *steps(rows), "", "## Aims", "", *aims(rows), ""]
    return "\n".join([*parts, "## Benchmarks", "", *benchmarks(rows), "", AMD, roofline.section()])


def read() -> Rows:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def steps(rows: Rows) -> Iterator[str]:
    yield "| Step | | seconds |"
    yield "| --- | --- | ---: |"
    of_steps = [row for row in rows if row["group"] == STEPS]
    for row in of_steps:
        yield f"| {row['name']} | {row['note']} | {float(row['median_ms']) / 1e3:.0f} |"
    if not of_steps:
        yield f"| all | {NOT_YET} | |"


def benchmarks(rows: Rows) -> Iterator[str]:
    """A table row for each implementation of each case."""
    yield "| Case | Implementation | call, ms | GPU, ms | GPU × the first | arithmetic, ms | GPU over it | peak MB | |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    group, first = None, ""
    measured = [row for row in rows if row["group"] != STEPS]
    for row in measured:
        case = "" if row["group"] == group else row["group"]
        if case:
            group, first = case, row["gpu_ms"]
        gpu, least = row["gpu_ms"], row["arithmetic_ms"]
        numbers = [row["median_ms"], gpu, _ratio(gpu, first), least, _ratio(gpu, least), row["peak_mb"]]
        cells = [case, row["name"], *numbers, row["note"]]
        yield f"| {' | '.join(cell.replace('*', chr(92) + '*').replace('|', '/') for cell in cells)} |"
    if not measured:
        yield f"| all | {NOT_YET} | | | | | | | |"


def _ratio(time: str, other: str) -> str:
    return f"{float(time) / float(other):.2f}" if time and other else ""


def aims(rows: Rows) -> Iterator[str]:
    yield "| Aim | at most | measured |"
    yield "| --- | ---: | ---: |"
    for aim in AIMS:
        ratio = aim.ratio(rows)
        yield f"| {aim.text} | {aim.most:.1f} | {NOT_YET if ratio is None else f'{ratio:.2f}'} |"


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


def _over_12_us_and_host(rows: Rows) -> float | None:
    times = _times(rows, "decode B1 H12 T1 prefix 8191 K8 D64 bfloat16", "median_ms")
    if "ours" not in times:
        return None
    (decoding,) = (shape for shape in roofline.SHAPES if shape.Tq == 1)
    return times["ours"] / (0.012 + 1e3 * roofline.host_s(decoding, backward=False))


AIMS = (
    Aim("Forward at T 1024, over flash attention of the text and the images' bytes", 1.3, _over_flash_and_image_bytes),
    Aim("Forward at T 4096 and D 128, over flash attention joined with the images", 1.2, _over_flash_merge),
    Aim("Call of a decoding step, over 12 µs and the time of the host", 1.0, _over_12_us_and_host),
)
