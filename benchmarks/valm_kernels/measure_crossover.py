"""Measures the text length from which flash attention with joined images beats the single kernel, for gpu-check.

    python -m benchmarks.valm_kernels.measure_crossover FOLDER

At each length both run a forward and a backward over equally many tokens, and must return equal results. Each time goes
to FOLDER/crossover.csv at once, so a stopped run continues. The lengths that follow go to FOLDER/crossover.json, which
the package's crossover.py loads. If a time of a head dimension is missing, its estimate stays and the exit status is 1.
The estimate also stays beyond the longest text if flash attention was not faster there. Then cuDNN's attention runs in
the place of flash attention: if it fails or returns other results at a length, it is not used for the head dimension.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks.outcomes import DEVICE_LOST, append_row
from benchmarks.valm_kernels.tune_tiles import (
    BEGUN,
    BEGUN_AGAIN,
    DIFFERS,
    FAILED,
    FAILED_AGAIN,
    GAIN,
    MEASURED,
    Case,
    are_close,
    first_line,
    has_failed,
)
from valm_kernels.atomic_files import atomic_path
from valm_kernels.visual_fusion import flash
from valm_kernels.visual_fusion.crossover import HEAD_DIMS, capability
from valm_kernels.visual_fusion.inputs import Inputs

LENGTHS = (512, 1024, 2048, 4096, 8192)
TOKENS = 8192
# Heads, key heads and images, by head dimension.
SIZES = {64: (12, 12, 8), 128: (32, 8, 4), 256: (8, 4, 4)}
ONE_KERNEL, FLASH, CUDNN = "triton", flash.NAME, "cudnn+triton"

# Milliseconds (None: failed, or only begun) and a note, by head dimension, length and implementation.
Times = dict[tuple[int, int, str], tuple[float | None, str]]


def cases() -> Iterator[tuple[int, int, str, Case]]:
    """Head dimension, length, implementation, call. cuDNN is last: if it kills the process, no other time is lost."""
    cudnn_dims = tuple(head_dim for head_dim in HEAD_DIMS if head_dim <= flash.CUDNN_DIM)
    for impls, head_dims in (((ONE_KERNEL, FLASH), HEAD_DIMS), ((CUDNN,), cudnn_dims)):
        for head_dim in head_dims:
            heads, kv_heads, images = SIZES[head_dim]
            for length in LENGTHS:
                sizes = (TOKENS // length, heads, kv_heads, length, length, images)
                case = Case(("forward", "query", "key"), torch.bfloat16, head_dim, *sizes)
                for impl in impls:
                    yield head_dim, length, impl, replace(case, flash=impl != ONE_KERNEL)


def measure(folder: Path) -> list[str]:
    """Measures the missing times, and writes crossover.json after each.

    Returns:
        The reason for each time that is still missing, without those of cuDNN.
    """
    path = folder / "crossover.csv"
    missing = []
    for head_dim, length, impl, case in cases():
        _, before = read_times(path).get((head_dim, length, impl), (None, ""))
        if before in ("", BEGUN) or has_failed(before):
            # noted first, so that a measurement that kills the process is tried twice at most
            row = {"head_dim": head_dim, "keys": length, "impl": impl, "ms": ""}
            append_row(path, row | {"note": BEGUN_AGAIN if before else BEGUN})
            try:
                inputs = case.inputs("cuda")
                with mock.patch.object(flash, "uses_cudnn", return_value=impl == CUDNN):
                    same = not case.flash or has_results_of_one_kernel(case, inputs)
                    ms = triton.testing.do_bench_cudagraph(lambda: case.run(inputs), rep=20, return_mode="median")  # noqa: B023
            except Exception as error:  # the compiler and CUDA raise many types
                failed = FAILED_AGAIN if has_failed(before) else FAILED
                append_row(path, row | {"note": f"{failed}: {first_line(error)}"})
            else:
                append_row(path, row | ({"ms": f"{ms:.6g}", "note": MEASURED} if same else {"note": DIFFERS}))
            torch.cuda.synchronize()  # raises if the GPU accepts no more work from this process
        ms, note = read_times(path)[head_dim, length, impl]
        if ms is None and impl != CUDNN:
            missing.append(f"{impl} at {length} keys of {head_dim}: {note}")
        write_crossover(folder)
    return missing


def has_results_of_one_kernel(case: Case, inputs: Inputs) -> bool:
    return are_close(replace(case, flash=False).run(inputs), case.run(inputs), case.dtype)


def shortest(times: Times, head_dim: int, slow: str, fast: str) -> int | None:
    """The least length from which on `fast` was faster than `slow` at every length, by more than chance (GAIN). None if
    it was not faster at the longest.

    Raises:
        KeyError: a time is missing.
    """
    found, slower = None, False
    for length in reversed(LENGTHS):
        one, two = (times[head_dim, length, impl][0] for impl in (slow, fast))
        if one is None or two is None:
            raise KeyError((head_dim, length))
        slower = slower or GAIN * two > one
        if not slower:
            found = length
    return found


def shortest_of_cudnn(times: Times, head_dim: int) -> int | None:
    """The least length from which on cuDNN's attention was faster than both others. None also if it failed or returned
    other results."""
    try:
        over_one_kernel, over_flash = (shortest(times, head_dim, slow, CUDNN) for slow in (ONE_KERNEL, FLASH))
    except KeyError:
        return None
    return over_one_kernel and over_flash and max(over_one_kernel, over_flash)


def write_crossover(folder: Path) -> None:
    """Writes FOLDER/crossover.json, with the head dimensions whose times are complete."""
    times = read_times(folder / "crossover.csv")
    entries = []
    for head_dim in HEAD_DIMS:
        try:
            keys = shortest(times, head_dim, ONE_KERNEL, FLASH)
        except KeyError:
            continue
        entry = {"capability": capability(torch.device("cuda")), "head_dim": head_dim, "keys": keys}
        entry |= {"cudnn_keys": shortest_of_cudnn(times, head_dim), "longest": LENGTHS[-1]}
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        entries.append(entry | {"device": torch.cuda.get_device_name()} | versions)
    if entries:
        with atomic_path(folder / "crossover.json") as partial:
            partial.write_text(json.dumps(entries, indent=1) + "\n")


def read_times(path: Path) -> Times:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (int(row["head_dim"]), int(row["keys"]), row["impl"]): (
                float(row["ms"]) if row["ms"] else None,
                row["note"],
            )
            for row in csv.DictReader(file)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        missing = measure(folder)
    except RuntimeError as error:  # from `synchronize`
        print(first_line(error))
        sys.exit(DEVICE_LOST)
    if missing:
        sys.exit("\n".join(["these times are missing:", *missing[-4:]]))


if __name__ == "__main__":
    main()
