"""Measures the tiles of the Triton kernels on this machine's GPU: gpu-check's way to a measured table.

    python -m benchmarks.valm_kernels.tune_tiles compile COMPILED --arch 90    # needs no GPU
    python -m benchmarks.valm_kernels.tune_tiles measure COMPILED FOLDER

Each entry of the table (tiles.py) is measured in a call for which it is made (CASES), with the candidates around it.
`compile` fills Triton's cache and lists its content in the file COMPILED; several such processes divide the work.
`measure` then only loads. Each measurement goes to FOLDER/candidates.csv at once, and the fastest tiles so far to
FOLDER/tiles.json, which tiles.py loads; so a stopped run continues. Tiles that change the results of the call are not
used, nor tiles whose machine code for 9.0 has a fault of ptxas (tests/checks/triton/wgmma.py). If an entry of the table
has no time, the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.outcomes import DEVICE_LOST, append_row, claim
from tests.checks.triton import wgmma
from tests.checks.triton.compile_record import Launch, cuobjdump, recorders, specialise
from valm_kernels.atomic_files import atomic_path
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import Gradients, Inputs
from valm_kernels.visual_fusion.triton import backward, backward_key, backward_query, forward, joined
from valm_kernels.visual_fusion.triton.launch import architecture
from valm_kernels.visual_fusion.triton.tiles import Tiles, tiles_for

CHOOSING = (forward, backward_query, backward_key)
# What launches the kernels of the table, in the modules that call it.
LAUNCHERS = (
    *((forward, "forward"), (backward, "query_gradients"), (backward, "key_gradients")),
    *((joined, "query_gradients"),),
)
# Tile products need blocks of at least 16.
MIN_BLOCK, MAX_BLOCK = 16, 128
MIN_WARPS, MAX_WARPS = 4, 8
MAX_STAGES = 4
# This candidate kills the compiler or the GPU's process. It is tried twice: the first time the step may have been
# stopped.
BEGUN, BEGUN_AGAIN = "begun", "begun again"
COMPILED, MEASURED = "compiled", "measured"
REUSED = "reuses the registers of a product in flight"  # a fault of ptxas
# A later process tries once more: the GPU may have been short of memory.
FAILED, FAILED_AGAIN = "does not run", "does not run again"
AGREES, DIFFERS = "agrees", "other results"
# Tiles replace the table's if they are faster by more than two measurements differ.
GAIN = 1.03
# Largest difference ÷ largest value, by bytes of an element: finds wrong results, not wrong last bits.
TOLERANCE = {2: 3e-2, 4: 1e-4}

# (ms, note) by case, kernel and tiles.
Rows = dict[tuple[Any, ...], tuple[float | None, str]]
Choose = Callable[[str, Inputs], Tiles]


@dataclass(frozen=True)
class Case:
    """A call whose kernels are measured. `kernels`: the entries of the table that it measures."""

    kernels: tuple[str, ...]
    dtype: torch.dtype
    head_dim: int
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    images: int
    softcap: float | None = None
    flash: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.batch} H{self.heads}/{self.kv_heads} Tq{self.queries} Tk{self.keys} K{self.images}"
        return f"{sizes} D{self.head_dim} {str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: str) -> Inputs:
        """Inputs in the memory order of projections: tokens before heads; a pool with 0.3 rows per image slot."""

        # a separate one: a failed capture in a CUDA graph leaves the device's unusable
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=self.dtype, device=device, generator=generator)

        q = normal(self.batch, self.queries, self.heads, self.head_dim).transpose(1, 2)
        k, v = (normal(self.batch, self.keys, self.kv_heads, self.head_dim).transpose(1, 2) for _ in range(2))
        rows = max(16, int(0.3 * self.batch * self.queries * self.images))
        pool_k, pool_v = (normal(rows, self.kv_heads, self.head_dim).transpose(0, 1) for _ in range(2))
        size = (self.batch, self.queries, self.images)
        index = torch.randint(rows, size, device=device, generator=generator)
        images = {"image_k": pool_k, "image_v": pool_v, "image_index": index}
        return checked_inputs(q=q, k=k, v=v, **images, softcap=self.softcap)

    def run(self, inputs: Inputs) -> list[Tensor]:
        """The results of the forward, and of the backward if its kernels are measured."""
        out, lse = (joined if self.flash else forward).forward(inputs)
        if not any(kernel.startswith(("query", "key")) for kernel in self.kernels):
            return [out, lse]
        module = joined if self.flash else backward
        needed = [True] * len(Gradients._fields)
        gradients = module.backward(torch.ones_like(out), None, None, out, lse, inputs, needed)
        return [out, lse, *(gradient for gradient in gradients if gradient is not None)]


def cases() -> list[Case]:
    """The most important first: 16 bits and the usual head dimensions."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in ((64, 4, 12, 12, 1024, 1024, 8), (128, 2, 32, 8, 2048, 2048, 4), (256, 1, 8, 4, 2048, 2048, 4)):
            plain = Case(("forward", "query", "key"), dtype, *sizes)
            found.append(plain)
            found.append(replace(plain, kernels=("decode",), batch=1, queries=1, keys=8192))
            if dtype == torch.bfloat16:
                found.append(replace(plain, kernels=("forward joined", "query joined"), flash=True))
            found.append(replace(plain, kernels=("query softcap", "key softcap"), softcap=50.0))
    return sorted(found, key=lambda case: (case.head_dim == 256, case.dtype == torch.float32))


@contextmanager
def chosen(choose: Choose) -> Iterator[None]:
    """Replaces choose_tiles by `choose`."""
    with ExitStack() as stack:
        for module in CHOOSING:
            stack.enter_context(mock.patch.object(module, "choose_tiles", choose))
        yield


def choice(case: Case, arch: int, kernel: str | None, tiles: Tiles | None) -> Choose:
    """Uses `tiles` for `kernel`, and the table's tiles for other kernels."""

    def choose(name: str, inputs: Inputs) -> Tiles:
        return tiles if tiles and name == kernel else tiles_for(name, arch, case.head_dim, case.dtype)

    return choose


def launches(case: Case, arch: int, kernel: str | None, tiles: Tiles | None) -> list[Launch]:
    """The launches of a case on a GPU of `arch`: all with the table's tiles, or `kernel` with other tiles."""

    with recorders(arch) as found, chosen(choice(case, arch, kernel, tiles)):
        case.run(case.inputs("meta"))
    wanted = found.values() if kernel is None else [found[kernel.split()[0].replace("decode", "forward")]]
    return [launch for recorder in wanted for launch in recorder.launches]


def candidates(tiles: Tiles) -> Iterator[Tiles]:
    """The given tiles, and some near them.

    A block is halved or doubled without and with the warps. Half of the rows with as many warps would repeat work; with
    half of the warps, two such programs share a multiprocessor.
    """
    yield tiles
    for block, size in (("block_m", tiles.block_m), ("block_n", tiles.block_n)):
        for other, warps in ((size // 2, tiles.num_warps // 2), (size * 2, tiles.num_warps * 2)):
            if MIN_BLOCK <= other <= MAX_BLOCK:
                yield replace(tiles, **{block: other})
                if MIN_WARPS <= warps <= MAX_WARPS:
                    yield replace(tiles, **{block: other, "num_warps": warps})
    for stages in (tiles.num_stages - 1, tiles.num_stages + 1):
        if 1 <= stages <= MAX_STAGES:
            yield replace(tiles, num_stages=stages)


def others(case: Case, kernel: str, arch: int) -> list[Tiles]:
    """The candidates, without the table's tiles."""
    table = tiles_for(kernel, arch, case.head_dim, case.dtype)
    return [tiles for tiles in candidates(table) if tiles != table]


def works(arch: int) -> list[tuple[Case, str | None, Tiles | None]]:
    """Everything to compile. (case, None, None): the launches of a case with the table's tiles."""
    found: list[tuple[Case, str | None, Tiles | None]] = []
    for case in cases():
        found.append((case, None, None))
        found += [(case, kernel, tiles) for kernel in case.kernels for tiles in others(case, kernel, arch)]
    return found


def compile_candidates(path: Path, arch: int) -> None:
    """Compiles the candidates that are not in the file `path` and that no other process compiles."""
    for number, (case, kernel, tiles) in enumerate(works(arch)):
        if not claim(path, number) or (tiles is not None and not begin(path, case, kernel, tiles)):
            continue
        note = COMPILED
        try:
            for launch in launches(case, arch, kernel, tiles):
                special = specialise(launch, arch)
                compiled = triton.compile(special.source, target=GPUTarget("cuda", arch, 32), options=special.options)
                if arch // 10 == 9 and wgmma.check(cuobjdump("-sass", compiled.asm["cubin"])).reused:
                    note = REUSED
        except Exception as error:  # passes of the compiler raise many types
            note = f"does not compile: {first_line(error)}"
        if tiles is not None:
            write_row(path, case, kernel, tiles, None, note)


def measure(folder: Path, compiled_file: Path) -> list[str]:
    """Measures the compiled candidates, and writes tiles.json after each case.

    Returns:
        The reason for each entry of the table without a time.
    """
    device = torch.device("cuda")
    arch = architecture(device)
    compiled = read_rows(compiled_file)
    path = folder / "candidates.csv"
    missing = []
    for case in cases():
        inputs = case.inputs("cuda")
        found, reason = launchers(case, inputs, arch)
        for kernel, tiles in pairs(case, arch):
            table = tiles == tiles_for(kernel, arch, case.head_dim, case.dtype)
            if kernel not in found or not (table or compiled.get(key(case, kernel, tiles), (None, ""))[1] == COMPILED):
                continue  # does not compile, or was not compiled in time
            _, before = read_rows(path).get(key(case, kernel, tiles), (None, ""))
            if begin(path, case, kernel, tiles):
                ms, note = time_of(found[kernel], tiles, FAILED_AGAIN if has_failed(before) else FAILED)
                write_row(path, case, kernel, tiles, ms, note)
                torch.cuda.synchronize()  # raises if the GPU accepts no more work from this process
        for kernel in case.kernels:
            while (best := fastest(case, kernel, arch, read_rows(path))) and not agrees(
                folder / "agreement.csv", case, inputs, arch, kernel, best
            ):
                write_row(path, case, kernel, best, None, DIFFERS)
                torch.cuda.synchronize()
            if best is None:
                table = tiles_for(kernel, arch, case.head_dim, case.dtype)
                _, note = read_rows(path).get(key(case, kernel, table), (None, reason))
                missing.append(f"{kernel}, {case}: {note}")
        write_tiles(folder, arch)
    return missing


def fastest(case: Case, kernel: str, arch: int, rows: Rows) -> Tiles | None:
    """The fastest measured tiles, or the table's if they are hardly slower. None if the table's tiles have no time."""
    times = times_of(case, kernel, arch, rows)
    table = tiles_for(kernel, arch, case.head_dim, case.dtype)
    if table not in times:
        return None
    best = min(times, key=times.__getitem__)
    return table if times[table] <= GAIN * times[best] else best


def times_of(case: Case, kernel: str, arch: int, rows: Rows) -> dict[Tiles, float]:
    found = {
        tiles: rows.get(key(case, kernel, tiles), (None, ""))[0] for name, tiles in pairs(case, arch) if name == kernel
    }
    return {tiles: ms for tiles, ms in found.items() if ms is not None}


def agrees(path: Path, case: Case, inputs: Inputs, arch: int, kernel: str, best: Tiles) -> bool:
    """Whether a call with these tiles returns the results of the table's tiles; recorded in the file `path`.

    False if two processes began this comparison and did not end it.
    """
    if not begin(path, case, kernel, best):
        return read_rows(path)[key(case, kernel, best)][1] == AGREES
    results = []
    try:
        for tiles in (tiles_for(kernel, arch, case.head_dim, case.dtype), best):
            with chosen(choice(case, arch, kernel, tiles)):
                results.append(case.run(inputs))
        same = are_close(*results, case.dtype)
    except Exception as error:  # an error of the GPU appears when a result is read
        print(f"{case}, {kernel}, {best}: {first_line(error)}", flush=True)
        same = False
    write_row(path, case, kernel, best, None, AGREES if same else DIFFERS)
    return same


def are_close(expected: list[Tensor], found: list[Tensor], dtype: torch.dtype) -> bool:
    return all(
        bool((one - other).abs().max() <= TOLERANCE[dtype.itemsize] * one.abs().max())
        for one, other in zip(expected, found, strict=True)
    )


def launchers(case: Case, inputs: Inputs, arch: int) -> tuple[dict[str, Callable[[Tiles], Any]], str]:
    """The launch of each kernel of a case on the GPU with given tiles, and the reasons for missing kernels."""
    found: dict[str, Callable[[Tiles], Any]] = {}

    def recorded(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            def launch(tiles: Tiles) -> None:
                with chosen(lambda name, inputs: tiles):
                    launcher(*arguments)

            def choose(name: str, inputs: Inputs) -> Tiles:
                found.setdefault(name, launch)
                return tiles_for(name, arch, case.head_dim, case.dtype)

            with chosen(choose):
                return launcher(*arguments)

        return call

    reason = ""
    with ExitStack() as stack:
        for module, name in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, name, recorded(getattr(module, name))))
        try:
            case.run(inputs)
        except Exception as error:  # kernels found before the error are still measured
            reason = first_line(error)
            print(f"{case}: {reason}", flush=True)
    return found, reason


def pairs(case: Case, arch: int) -> list[tuple[str, Tiles]]:
    """Each kernel of a case with each of its tiles, the table's tiles first."""
    found = []
    for kernel in case.kernels:
        table = tiles_for(kernel, arch, case.head_dim, case.dtype)
        found += [(kernel, tiles) for tiles in (table, *others(case, kernel, arch))]
    return found


def time_of(launch: Callable[[Tiles], Any], tiles: Tiles, failed: str) -> tuple[float | None, str]:
    """Milliseconds of the GPU, with L2 flushed between calls, or the reason why there are none."""
    try:
        return triton.testing.do_bench(lambda: launch(tiles), warmup=5, rep=30, return_mode="median"), MEASURED
    except Exception as error:  # too much shared memory, or an error of the compiler or CUDA
        return None, f"{failed}: {first_line(error)}"


def write_tiles(folder: Path, arch: int) -> None:
    """Writes FOLDER/tiles.json: the fastest compared tiles of each entry whose table's tiles were measured."""
    rows, compared = read_rows(folder / "candidates.csv"), read_rows(folder / "agreement.csv")
    entries = []
    for case in cases():
        for kernel in case.kernels:
            best = fastest(case, kernel, arch, rows)
            if best is None or compared.get(key(case, kernel, best), (None, ""))[1] != AGREES:
                continue
            times = times_of(case, kernel, arch, rows)
            table = tiles_for(kernel, arch, case.head_dim, case.dtype)
            entries.append(
                {
                    "kernel": kernel,
                    "bytes": case.dtype.itemsize,
                    "capability": arch,
                    "head_dim": case.head_dim,
                    **asdict(best),
                    "ms": times[best],
                    "table_ms": times[table],
                    "case": str(case),
                    "candidates": len(times),
                    "device": torch.cuda.get_device_name(),
                    "triton": triton.__version__,
                }
            )
    if entries:
        with atomic_path(folder / "tiles.json") as partial:
            partial.write_text(json.dumps(entries, indent=1) + "\n")


def key(case: Case, kernel: str, tiles: Tiles) -> tuple[Any, ...]:
    return (str(case), kernel, *astuple(tiles))


def begin(path: Path, case: Case, kernel: str, tiles: Tiles) -> bool:
    """Whether this is still to be done; records that it begins."""
    _, note = read_rows(path).get(key(case, kernel, tiles), (None, ""))
    if note not in ("", BEGUN) and not has_failed(note):
        return False
    write_row(path, case, kernel, tiles, None, BEGUN_AGAIN if note else BEGUN)
    return True


def has_failed(note: str) -> bool:
    """Whether it failed once, perhaps by a transient error."""
    return note.startswith(f"{FAILED}: ")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def write_row(path: Path, case: Case, kernel: str | None, tiles: Tiles, ms: float | None, note: str) -> None:
    row = {"case": case, "kernel": kernel, **asdict(tiles), "ms": "" if ms is None else f"{ms:.6g}", "note": note}
    append_row(path, row)


def read_rows(path: Path) -> Rows:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (row["case"], row["kernel"], *(int(row[name]) for name in Tiles.__dataclass_fields__)): (
                float(row["ms"]) if row["ms"] else None,
                row["note"],
            )
            for row in csv.DictReader(file)
            if row["case"] != "case"  # two processes may both begin the file
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compiling, measuring = commands.add_parser("compile"), commands.add_parser("measure")
    for command in (compiling, measuring):
        command.add_argument("compiled", type=Path, help="the file that notes what is compiled")
    compiling.add_argument("--arch", type=int, default=90, help="the compute capability to compile for, 90 for 9.0")
    measuring.add_argument("folder", type=Path, help="where the results go")
    arguments = parser.parse_args()
    if arguments.command == "compile":
        arguments.compiled.parent.mkdir(parents=True, exist_ok=True)
        compile_candidates(arguments.compiled, arguments.arch)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        missing = measure(arguments.folder, arguments.compiled)
    except RuntimeError as error:  # from `synchronize`
        print(first_line(error))
        sys.exit(DEVICE_LOST)
    if missing:
        sys.exit("\n".join(["these entries of the table have no time:", *missing[-4:]]))


if __name__ == "__main__":
    main()
