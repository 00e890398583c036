"""Figures of ptxas for the CUDA kernels: registers, spills, and how their loops of products load rows.

The figures are for each architecture for which setup.py builds machine code. `python -m tests.checks.cuda.ptxas`
rewrites the committed table.
"""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "benchmarks" / "records" / "ptxas.csv"
ARCHITECTURES = ("80", "90")


class Figures(NamedTuple):
    """A row of the record. All tables in benchmarks/records/ begin with these columns."""

    kernel: str
    variant: str  # template arguments
    arch: str
    registers: int
    spill_bytes: int  # spill stores and loads
    shared_bytes: int  # static; a launch adds dynamic shared memory
    stack_bytes: int
    # in the innermost loop with tensor-core instructions, zeros without one
    mma: int
    copies: int  # asynchronous, from device to shared memory
    loads: int  # from device memory to registers


def nvcc_version() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\S+),", output).group(1)


def source_hash() -> str:
    """Hash of csrc/topk/cuda/search.cu and all that it includes from csrc/, to which the figures belong."""
    found, contents = ["topk/cuda/search.cu"], []
    for name in found:
        contents.append((ROOT / "csrc" / name).read_bytes())
        included = re.findall(r'^#include "(.+)"$', contents[-1].decode(), re.MULTILINE)
        found += [other for other in included if other not in found]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def measure(architecture: str) -> list[Figures]:
    """Compiles csrc/topk/cuda/search.cu and returns the figures of each kernel, ordered by name."""
    import triton  # only on Linux

    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}"]
        command += ["-cubin", str(ROOT / "csrc/topk/cuda/search.cu"), "-o", f"{folder}/cuda.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        dump = subprocess.run([cuobjdump, "-sass", f"{folder}/cuda.cubin"], capture_output=True, text=True, check=True)
    code = subprocess.run(["c++filt"], input=dump.stdout, capture_output=True, text=True, check=True).stdout
    loops = {
        _kernel_and_variant(name): _product_loop(instructions)
        for name, instructions in re.findall(r"Function : ([^\n]+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL)
    }
    log = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(
        r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill "
        r"stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?:[^\n]*, (?P<shared>\d+) bytes smem)?",
        log,
        re.DOTALL,
    )
    return sorted(
        Figures(
            *_kernel_and_variant(name),
            architecture,
            int(registers),
            int(stores) + int(loads),
            int(shared or 0),
            int(stack),
            *loops[_kernel_and_variant(name)],
        )
        for name, stack, stores, loads, registers, shared in kernels
    )


def _product_loop(instructions: str) -> tuple[int, ...]:
    """Figures.mma, copies and loads of a kernel."""
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,5})\*/ +([^;]+);", instructions)]
    backward = [
        (int(to, 16), at)
        for at, line in lines
        for to in re.findall(r"\bBRA (?:\S+, )?0x([0-9a-f]+)", line)
        if int(to, 16) < at
    ]
    loops = [[line for at, line in lines if first <= at <= last] for first, last in backward]
    loops = [loop for loop in loops if any(re.search(r"\b[HI]MMA\b", line) for line in loop)]
    innermost = min(loops, key=len, default=[])
    return tuple(
        sum(re.search(rf"\b{name}\b", line) is not None for line in innermost) for name in ("[HI]MMA", "LDGSTS", "LDG")
    )


def _kernel_and_variant(signature: str) -> tuple[str, str]:
    """first_pass_kernel and "Float16Rows 4" of void valm::first_pass_kernel<valm::Float16Rows, 4>(valm::Search)."""
    name, _, variant = re.sub(r"^void |>?\(.*\)$|valm::", "", signature).partition("<")
    return name, variant.replace(",", "")


def read_table() -> tuple[str, str, dict[tuple[str, str, str], Figures]]:
    """The table's nvcc version and hash of sources, and its figures by kernel, variant and architecture."""
    with TABLE.open(newline="") as file:
        version, sources = re.fullmatch(r"# nvcc (\S+), sources (\S+)", file.readline().strip()).groups()
        rows = [Figures(*row[:3], *map(int, row[3:])) for row in list(csv.reader(file))[1:]]
    return version, sources, {row[:3]: row for row in rows}


def write_table() -> None:
    rows = [row for architecture in ARCHITECTURES for row in measure(architecture)]
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {nvcc_version()}, sources {source_hash()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Figures._fields)
        writer.writerows(rows)


if __name__ == "__main__":
    write_table()
