"""Shared by all benchmarks: checks each result, then times it with pytest-benchmark, or without it in a plain loop.

    pytest benchmarks/ --benchmark-only                       # a few minutes on any machine
    pytest benchmarks/ --benchmark-only --full                # the large sizes too
    pytest benchmarks/ --benchmark-only --results FILE.csv    # also add each row to a file as soon as it is measured
    pytest benchmarks/ --benchmark-disable --full --tiny      # each body once, at a tiny size, without times

A benchmark is one test per implementation of one case; `group` names the case:

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def bench_forward(measure, name):
        measure(group="forward B4 H12 T1024", name=name, function=..., check=...)

Large sizes are marked `@pytest.mark.full`. On CUDA the time of a call includes the host, until the result is there. If
`measure` gets the `inputs`, the row also contains the GPU's own time (gpu_time.py) and the peak of PyTorch's allocator.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from timeit import timeit
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sizes
from benchmarks.gpu_time import gpu_ms
from benchmarks.outcomes import append_row

COLUMNS = ("group", "name", "median_ms", "min_ms", "rounds", "gpu_ms", "arithmetic_ms", "peak_mb", "note", "machine")
# Most seconds for all rounds of a row, without and with --full. Each row runs at least one round.
SECONDS_OF_A_ROW = {False: 3.0, True: 10.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the large benchmark sizes too")
    parser.addoption("--tiny", action="store_true", help="sizes that a test runs, whose times say nothing")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the operations run")
    parser.addoption(
        "--scratch", type=Path, default=Path("build/benchmarks"), help="where large inputs are kept between runs"
    )
    parser.addoption("--results", type=Path, help="add the benchmark rows to this CSV file")
    parser.addoption("--vectors", type=Path, help="search these too: a folder with rows.npy and queries.npy")


def pytest_configure(config: pytest.Config) -> None:
    sizes.tiny = config.getoption("--tiny")
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(PlainBenchmark())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="a large size: run with --full"))


class PlainLoop:
    """The part of pytest-benchmark's fixture that `measure` uses, for machines without it."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Callable[[], Any], rounds: int) -> Any:
        times = []
        for _ in range(rounds):
            start = perf_counter()
            result = function()
            times.append(perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=median(times), min=min(times), rounds=rounds))
        return result


class PlainBenchmark:
    @pytest.fixture
    def benchmark(self) -> PlainLoop:
        return PlainLoop()


@cache
def machine() -> str:
    """The hardware and versions of this run."""
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


def cuda_peak_mb(function: Callable[[], Any]) -> float:
    """The peak MB of PyTorch's allocator during a call, above its level before the call."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def on_cuda(device: torch.device) -> None:
    """Only a GPU measures this benchmark; a test runs it on the CPU, at a tiny size."""
    if device.type != "cuda" and not sizes.tiny:
        pytest.skip("measured on CUDA only")


@pytest.fixture
def measure(benchmark: Any, device: torch.device, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Check a function's result, then time it: `measure(group, name, function, check)`.

    Args:
        inputs: arguments of `function`. The GPU's own time is measured on copies of them in turn.
        rounds: at most.
        note: a text, or a function that makes the text from the last result.
        arithmetic: the least seconds on an H100 (roofline.py), reported next to a GPU's time.
    """

    def run(
        *,
        group: str,
        name: str,
        function: Callable[..., Any],
        check: Callable[[Any], None],
        inputs: tuple[Tensor, ...] = (),
        rounds: int = 10,
        note: str | Callable[[Any], str] = "",
        arithmetic: float | None = None,
    ) -> None:
        def finished() -> Any:
            result = function(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        check(finished())
        seconds = SECONDS_OF_A_ROW[pytestconfig.getoption("--full")]
        affordable = 1 if benchmark.disabled else int(seconds / timeit(finished, number=1))
        benchmark.group, benchmark.name = group, name
        result = benchmark.pedantic(finished, rounds=max(1, min(rounds, affordable)))
        notes = [note if isinstance(note, str) else note(result)]
        if benchmark.disabled:
            return
        stats = benchmark.stats.stats
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"group": group, "name": name, "machine": machine()}
        row |= {"median_ms": stats.median * 1e3, "min_ms": stats.min * 1e3, "rounds": stats.rounds}
        if device.type == "cuda":
            row |= {"peak_mb": cuda_peak_mb(finished), "arithmetic_ms": arithmetic and arithmetic * 1e3}
            try:
                row["gpu_ms"] = gpu_ms(function, inputs, device) if inputs else None
            except RuntimeError as error:
                notes.append(f"no GPU time: {str(error).splitlines()[0]}")
        row["note"] = "; ".join(filter(None, notes))
        benchmark.extra_info.update(row)
        benchmark.stats.name = f"{name} {row['note']}".rstrip()  # which pytest-benchmark prints
        if path := pytestconfig.getoption("--results"):
            append_row(path, {key: f"{cell:.4g}" if isinstance(cell, float) else cell for key, cell in row.items()})

    return run
