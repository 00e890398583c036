"""What every benchmark shares: a result is checked before it is timed, and each row is set beside its peers.

    pytest benchmarks/ --benchmark-only                       # a few minutes on any machine
    pytest benchmarks/ --benchmark-only --full                # the large sizes too
    pytest benchmarks/ --benchmark-only --results FILE.csv    # also write each row, with the machine it came from

A benchmark is one test per implementation of one case; `group` names the case:

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def bench_forward(measure, name):
        measure(group="forward B4 H12 T1024", name=name, function=..., check=..., flop=..., bytes_moved=...)

The rows of a group are printed together, with their time as a multiple of the group's first row (ours). A row is in the
file as soon as it is measured. On CUDA the time of a call is that of its host too, until the result is there; beside it
is the GPU's own time, where `measure` is given the `inputs` (gpu_time.py). A large
size is marked `@pytest.mark.full`. Peak memory is what the call needs above its inputs: on CUDA always, on CPU where a
benchmark says how a fresh process builds the call (`fresh`, see peak_memory.py).

A call that takes long is timed in fewer rounds (`SECONDS_OF_A_ROW`). Where pytest-benchmark is missing, a few lines
here do its part.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_time import gpu_ms
from benchmarks.peak_memory import peak_mb


@dataclass
class Row:
    group: str
    name: str
    median_ms: float
    min_ms: float
    gpu_ms: float | None
    rounds: int
    gb_per_s: float | None
    gflop_per_s: float | None
    share_of_roof: float | None
    peak_mb: float | None
    arithmetic_ms: float | None
    time_over_first: float
    note: str


ROWS: list[Row] = []
# The time of the first row of each group, also where an earlier run wrote it.
FIRST_MS: dict[str, float] = {}
COLUMNS = (*Row.__dataclass_fields__, "machine")
# Seconds that the rounds of a row may take together, without and with --full; a row has one round at least.
SECONDS_OF_A_ROW = {False: 4.0, True: 30.0}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--full", action="store_true", help="run the large benchmark sizes too")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the operations run")
    parser.addoption(
        "--scratch", type=Path, default=Path("build/benchmarks"), help="where large inputs are kept between runs"
    )
    parser.addoption("--results", type=Path, help="write the benchmark rows to this CSV file")
    parser.addoption("--append", action="store_true", help="add the rows to those that --results has already")
    if not pluginmanager.hasplugin("benchmark"):
        parser.addoption("--benchmark-only", action="store_true", help="nothing: there are only benchmarks here")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(WithoutPytestBenchmark())
    path = config.getoption("--results")
    if path and config.getoption("--append") and path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                FIRST_MS.setdefault(row["group"], float(row["median_ms"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="a large size: run with --full"))


@cache
def machine() -> str:
    """The hardware and versions the numbers of this run belong to."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        isa = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
        processor = f"{names[0] if names else processor} ({' '.join(isa)})"
    parts = [f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return "; ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


@cache
def roofs(device: torch.device) -> tuple[float, float]:
    """(float32 FLOP/s of a large matrix product, bytes/s of a parallel sum), measured here and now on `device`."""
    matrix = torch.randn(1536, 1536, device=device)
    integers = torch.ones(1 << 25, dtype=torch.int64, device=device)

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * 1536**3 / best(lambda: matrix @ matrix), integers.numel() * 8 / best(integers.sum)


def cuda_peak_mb(function: Callable[[], Any]) -> float:
    """MB that PyTorch's allocator holds at the most during a call, above what it held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@dataclass
class Stopwatch:
    """What `measure` needs of pytest-benchmark, in its place. `stats.stats` is itself, as there."""

    times: list[float] = field(default_factory=list)
    group: str = ""

    def pedantic(self, function: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            start = time.perf_counter()
            function()
            self.times.append(time.perf_counter() - start)

    @property
    def stats(self) -> Stopwatch:
        return self

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def min(self) -> float:
        return min(self.times)

    @property
    def rounds(self) -> int:
        return len(self.times)


class WithoutPytestBenchmark:
    """Its fixture, as a plugin."""

    @pytest.fixture
    def benchmark(self) -> Stopwatch:
        return Stopwatch()


@pytest.fixture
def measure(benchmark: Any, device: torch.device, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Check a function's result, then time it: `measure(group, name, function, check, flop, bytes_moved)`.

    note: a text, or what makes one of the result. inputs: what function is called with, for the GPU's own time with
    copies of them in turn. fresh: (build, *arguments) for `peak_mb`. arithmetic: the least seconds that an H100 needs,
    by roofline.py; it stands beside what a card measures.
    """

    def run(
        *,
        group: str,
        name: str,
        function: Callable[..., Any],
        check: Callable[[Any], None],
        inputs: tuple[Tensor, ...] = (),
        flop: float | None = None,
        bytes_moved: float | None = None,
        rounds: int = 10,
        note: str | Callable[[Any], str] = "",
        fresh: tuple[Any, ...] | None = None,
        arithmetic: float | None = None,
    ) -> None:
        def finished() -> Any:
            result = function(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        start = time.perf_counter()
        result = finished()
        if rounds > 3:  # otherwise too long for a warm-up besides the check
            start = time.perf_counter()
            finished()
        affordable = int(SECONDS_OF_A_ROW[pytestconfig.getoption("--full")] / (time.perf_counter() - start))
        check(result)
        benchmark.group = group
        benchmark.pedantic(finished, rounds=max(1, min(rounds, affordable)))
        if benchmark.stats is None:  # --benchmark-disable
            return
        stats = benchmark.stats.stats
        peak_flops, peak_bytes = roofs(device)
        if device.type == "cuda":
            peak = cuda_peak_mb(finished)
        else:
            peak = peak_mb(*fresh) if fresh else None
        least = max((flop or 0) / peak_flops, (bytes_moved or 0) / peak_bytes)
        notes = [note if isinstance(note, str) else note(result)]
        of_gpu = None
        if device.type == "cuda" and inputs:
            try:
                of_gpu = gpu_ms(function, inputs, device)
            except RuntimeError as error:
                notes.append(f"no GPU time: {str(error).splitlines()[0]}")
        row = Row(
            group=group,
            name=name,
            median_ms=stats.median * 1e3,
            min_ms=stats.min * 1e3,
            gpu_ms=of_gpu,
            rounds=stats.rounds,
            gb_per_s=bytes_moved / stats.median / 1e9 if bytes_moved else None,
            gflop_per_s=flop / stats.median / 1e9 if flop else None,
            # the roof is that of float32, which tensor cores multiply otherwise
            share_of_roof=least / stats.median if least and device.type == "cpu" else None,
            peak_mb=peak,
            arithmetic_ms=arithmetic * 1e3 if arithmetic and device.type == "cuda" else None,
            time_over_first=stats.median * 1e3 / FIRST_MS.setdefault(group, stats.median * 1e3),
            note="; ".join(filter(None, notes)),
        )
        if path := pytestconfig.getoption("--results"):
            begin = not ROWS and not (pytestconfig.getoption("--append") and path.exists())
            write_row(path, row, begin)
        ROWS.append(row)

    return run


def write_row(path: Path, row: Row, begin: bool) -> None:
    """The machine has a column of its own, so that files can be joined."""
    cells = {key: f"{cell:.4g}" if isinstance(cell, float) else cell for key, cell in asdict(row).items()}
    with path.open("w" if begin else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if begin:
            writer.writeheader()
        writer.writerow({**cells, "machine": machine()})
        file.flush()
        os.fsync(file.fileno())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("measured beside its peers")
    write(machine())
    peak_flops, peak_bytes = roofs(torch.device(config.getoption("--device")))
    write(f"roof: {peak_flops / 1e9:.0f} GFLOP/s float32 matrix product, {peak_bytes / 1e9:.1f} GB/s parallel sum")
    width = max(len(row.name) for row in ROWS)
    groups = list(dict.fromkeys(row.group for row in ROWS))
    for group in groups:
        write(f"\n{group}")
        write(f"  {'':<{width}}  median ms    GPU ms      GB/s   GFLOP/s   of roof   peak MB   time / first row's")
        for row in ROWS:
            if row.group != group:
                continue
            gpu = f"{row.gpu_ms:9.4f}" if row.gpu_ms is not None else " " * 9
            gb = f"{row.gb_per_s:9.1f}" if row.gb_per_s else " " * 9
            gflop = f"{row.gflop_per_s:9.1f}" if row.gflop_per_s else " " * 9
            roof = f"{row.share_of_roof:8.0%}" if row.share_of_roof else " " * 8
            peak = f"{row.peak_mb:9.1f}" if row.peak_mb is not None else " " * 9
            write(
                f"  {row.name:<{width}} {row.median_ms:10.3f} {gpu} {gb} {gflop}  {roof} {peak}   "
                f"{row.time_over_first:6.2f} x  {row.note}"
            )
    if path := config.getoption("--results"):
        write(f"\nwritten: {path}")
