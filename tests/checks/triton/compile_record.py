"""Compiles the Triton kernels for GPUs that are not there, and collects the compiler's report.

The launchers run on meta tensors with a recorder instead of every kernel. Each recorded launch is compiled ahead of
time exactly as Triton would specialise it for a GPU of the architecture. Triton caches the results by the hash of
source and options.

benchmarks/records/triton_compile.csv records the figures of one Triton version. After an intended change of a kernel or
its tiles, rewrite the table on all cores, in minutes:

    python -m tests.checks.triton.compile_record
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tests.checks.triton.loops import Spills, products_in_ptx, products_of_amd, spills_in_sass, spills_of_amd
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import Gradients, Inputs
from valm_kernels.visual_fusion.layout import empty_image_scores
from valm_kernels.visual_fusion.triton import (
    backward,
    backward_bias,
    backward_key,
    backward_pool,
    backward_query,
    forward,
    joined,
)
from valm_kernels.visual_fusion.triton import launch as launchers

TABLE = Path(__file__).parents[3] / "benchmarks" / "records" / "triton_compile.csv"
IMAGES = ("image_k", "image_v", "image_index", "image_mask")
BIASES = ("image_k_bias", "image_v_bias", "image_logit_bias")
ARCHITECTURES = (80, 90, 100, "gfx942")
HEAD_DIMS = (64, 128, 256)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# bfloat16 uses float16's tiles: none of 126 pairs of kernels differed in spills or shared memory (Triton 3.9.0).
RECORDED_DTYPES = ("float16", "float32")
KERNELS = {
    "forward": (forward, "_forward_kernel"),
    "merge": (forward, "_merge_kernel"),
    "query": (backward_query, "_query_kernel"),
    "bias": (backward_bias, "_bias_kernel"),
    "range": (backward_key, "_query_range_kernel"),
    "key": (backward_key, "_key_kernel"),
    "popular": (backward_pool, "_popular_kernel"),
    "pool": (backward_pool, "_pool_kernel"),
}
# What is compiled, as (kernel, call). Decoding is one query against a cache of 4096 keys.
CASES = (
    ("forward", "dense"),
    ("forward", "decode"),
    ("merge", "decode"),
    ("query", "dense"),
    ("bias", "dense"),
    ("key", "dense"),
    ("popular", "pooled"),
    ("pool", "pooled"),
    ("forward", "softcap image_q"),
    ("query", "softcap image_q"),
    ("key", "softcap image_q"),
    ("forward", "joined"),
    ("query", "joined"),
)
# Limits of a multiprocessor and of a block (CUDA C++ Programming Guide, compute capabilities).
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
SHARED_PER_BLOCK = {
    **dict.fromkeys((86, 89, 120), 99 * 1024),
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    "gfx942": 64 * 1024,
}
TENSOR_MEMORY_COLUMNS = 512
# SIMD units of a gfx9 compute unit, each with its own wavefronts.
SIMDS = 4
# Products of tiles at each step of a loop.
PRODUCTS = {"forward": 2, "query": 3, "key": 4}
# Registers are allocated per warp in units of 256; each block needs 1 KiB of shared memory for the system.
REGISTER_UNIT = 256
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Report:
    """A row of the table: a compiled kernel, its launch and the compiler's figures."""

    kernel: str
    variant: str
    arch: str
    registers: int
    spill_bytes: int
    # spill instructions in loops over keys or queries, and over images
    text_loop_spills: int
    image_loop_spills: int
    products: float | None  # multiply-adds issued on tensor cores ÷ multiply-adds needed
    shared_bytes: int
    block_m: int | None
    block_n: int | None
    warps: int
    stages: int
    warps_per_sm: int
    mma: str


@dataclass(frozen=True)
class Launch:
    """The arguments of a launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Recorder:
    """Replaces a kernel, and records its launches and their grids."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grids.append(grid)
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        self.launches.append(Launch(self.kernel, arguments, keywords))


@contextmanager
def recorders(arch: int | str) -> Iterator[dict[str, Recorder]]:
    """Replaces every kernel by a recorder, on a GPU of `arch` with the multiprocessors of an H100."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launchers, "architecture", lambda _: arch))
        stack.enter_context(mock.patch.object(forward, "multiprocessors", lambda _: 132))
        found = {name: Recorder(getattr(*place)) for name, place in KERNELS.items()}
        for name, place in KERNELS.items():
            stack.enter_context(mock.patch.object(*place, found[name]))
        yield found


def meta_inputs(
    head_dim: int,
    dtype: torch.dtype,
    pooled: bool,
    q_len: int = 1024,
    k_len: int = 1024,
    images: int = 8,
    group: int = 1,
    index_dtype: torch.dtype = torch.int64,
    softcap: float | None = None,
    image_q: bool = False,
    score_bias: bool = False,
    seqlens: bool = False,
    by_head: bool = False,
) -> Inputs:
    """Arguments of forward with every option except those given here: B 4, 12 key-value heads, T 1024, K 8."""
    batch, heads = 4, 12

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = empty(batch, q_len, heads * group, head_dim).transpose(1, 2)
    k = empty(batch, k_len, heads, head_dim).transpose(1, 2)
    if pooled:
        image = empty(9000, heads, head_dim).transpose(0, 1)
        of_heads = (heads,) if by_head else ()
        index, mask = empty(batch, *of_heads, q_len, images, dtype=index_dtype), None
    else:
        image = empty(batch, q_len, images, heads, head_dim).permute(0, 3, 1, 2, 4)
        index, mask = None, empty(batch, q_len, images, dtype=torch.bool)
    bias, logit_bias = empty(heads, head_dim), empty(heads * group, dtype=torch.float32)
    first_key = empty(batch, q_len, dtype=torch.int32)
    own_q = q if image_q else None
    lengths = empty(batch, dtype=torch.int32) if seqlens else None
    of_scores = empty(batch, q_len, images, dtype=torch.float32) if score_bias else None
    images = {"image_k": image, "image_v": image, "image_q": own_q, "image_index": index, "image_mask": mask}
    biases = {"image_k_bias": bias, "image_v_bias": bias, "image_logit_bias": logit_bias, "image_score_bias": of_scores}
    limits = {"first_key": first_key, "cache_seqlens": lengths, "softcap": softcap}
    return checked_inputs(q=q, k=k, v=k, **images, **biases, **limits)


def without(inputs: Inputs, *names: str) -> Inputs:
    return inputs._replace(**dict.fromkeys(names))


def record(
    kernel: str, arch: int | str, inputs: Inputs, with_lse: bool, with_image_scores: bool, with_flash: bool = False
) -> Launch:
    """The last launch of `kernel` in forward or backward."""
    q = inputs.q
    image_scores = empty_image_scores(inputs, wanted=True) if with_image_scores else None
    with recorders(arch) as found:
        if kernel in ("forward", "merge"):
            (joined if with_flash else forward).forward(inputs, image_scores)
        else:
            lse = q.new_empty(q.shape[:3], dtype=torch.float32)
            results = (lse if with_lse else None, image_scores, q, lse)
            module = joined if with_flash else backward
            module.backward(q, *results, inputs, needed=[True] * len(Gradients._fields))
    return found[kernel].launches[-1]


@dataclass(frozen=True)
class Specialisation:
    """One variant of a kernel: what Triton would compile for a launch. Launches with equal keys share it."""

    key: str
    source: ASTSource
    options: dict[str, Any]
    values: dict[str, Any]  # of the arguments by name


def target(arch: int | str) -> GPUTarget:
    """A GPU of a compute capability, or of an AMD architecture, whose wavefronts have 64 threads up to gfx9."""
    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def specialise(launch: Launch, arch: int | str) -> Specialisation:
    """What a launch would compile on a GPU of `arch`, by Triton's own rules."""
    function = launch.kernel
    backend = make_backend(target(arch))
    bind = create_function_from_signature(function.signature, function.params, backend)
    keywords = {"debug": False, **launch.keywords}
    values, specialization, options = bind(*launch.arguments, **keywords)
    parsed, signature, constants, attributes = function._pack_args(backend, keywords, values, specialization, options)
    source = ASTSource(function, signature, constants, attributes)
    return Specialisation(f"{specialization}{options}", source, parsed.__dict__, values)


@cache
def compile_case(kernel: str, call: str, arch: int | str, head_dim: int, dtype: str) -> Report:
    """Compiles one row of the table. Triton's exceptions pass."""
    inputs = call_inputs(call, head_dim, dtype)
    options = {"with_lse": False, "with_flash": True} if call == "joined" else {}
    _, report = compile_kernel(*row_key(kernel, call, arch, head_dim, dtype)[:2], arch, inputs, **options)
    return report


def call_inputs(call: str, head_dim: int, dtype: str) -> Inputs:
    options = {"decode": {"q_len": 1, "k_len": 4096}, "softcap image_q": {"softcap": 50.0, "image_q": True}}
    inputs = meta_inputs(head_dim, DTYPES[dtype], call == "pooled", **options.get(call, {}))
    return without(inputs, "first_key") if call == "joined" else inputs


def row_key(kernel: str, call: str, arch: int | str, head_dim: int, dtype: str) -> tuple[str, str, str]:
    """Kernel, variant and architecture of a case, in the table's words."""
    return kernel, f"{call} D{head_dim} {dtype}", f"sm_{arch}" if isinstance(arch, int) else arch


def compile_kernel(
    kernel: str,
    variant: str,
    arch: int | str,
    inputs: Inputs,
    with_lse: bool = True,
    with_image_scores: bool = False,
    with_flash: bool = False,
) -> tuple[str, Report]:
    """Compiles `kernel` as it would be launched for `inputs`, in the backward with or without the gradients of lse and
    of the image scores. With flash attention for the text, as impl="flash+triton" launches it. Returns the PTX (for
    NVIDIA GPUs) and the report."""
    special = specialise(record(kernel, arch, inputs, with_lse, with_image_scores, with_flash), arch)
    compiled = triton.compile(special.source, target=target(arch), options=special.options)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    values = special.values
    if isinstance(arch, int):
        usage = _nvidia_usage(compiled.asm, warps, shared, getattr(compiled.metadata, "tmem_size", 0), arch)
    else:
        usage = _amd_usage(compiled.asm["amdgcn"], warps, shared, arch)
    issued = usage.pop("issued")
    report = Report(
        kernel=kernel,
        variant=variant,
        arch=f"sm_{arch}" if isinstance(arch, int) else arch,
        shared_bytes=shared,
        block_m=values.get("BLOCK_M"),
        block_n=values.get("BLOCK_N"),
        warps=warps,
        stages=compiled.metadata.num_stages,
        products=round(issued / _products_needed(kernel, values), 2) if issued else None,
        **usage,
    )
    return compiled.asm.get("ptx", ""), report


def _products_needed(kernel: str, values: dict[str, Any]) -> int:
    """Multiply-adds of one step of the loop over tiles; float32 by tf32x3 counts three times."""
    terms = 3 if values["INPUT_PRECISION"] == "tf32x3" else 1
    return PRODUCTS[kernel] * terms * values["BLOCK_M"] * values["BLOCK_N"] * values["BLOCK_D"]


def _nvidia_usage(asm: Any, warps: int, shared: int, tensor_memory: int, arch: int) -> dict[str, Any]:
    """The figures of ptxas for a kernel, and of its code."""
    usage = cuobjdump("-res-usage", asm["cubin"])
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    spills = spills_in_sass(cuobjdump("-sass", asm["cubin"])) if stack + local else Spills(0, 0)
    blocks = min(
        BLOCKS_PER_SM,
        WARPS_PER_SM // warps,
        REGISTERS_PER_SM // (triton.cdiv(32 * registers, REGISTER_UNIT) * REGISTER_UNIT * warps),
        (SHARED_PER_BLOCK[arch] + SHARED_RESERVED) // (shared + SHARED_RESERVED),
        TENSOR_MEMORY_COLUMNS // max(tensor_memory, 1),
    )
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "text_loop_spills": spills.text,
        "image_loop_spills": spills.images,
        "warps_per_sm": blocks * warps,
        "mma": " ".join(sorted(set(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", asm["ptx"])))),
        "issued": products_in_ptx(asm["ptx"], warps),
    }


def _amd_usage(assembly: str, warps: int, shared: int, arch: str) -> dict[str, Any]:
    """The figures from AMDGCN assembly: bytes of scratch memory per thread, wavefronts per compute unit."""

    def figure(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", assembly)[1])

    spills = spills_of_amd(assembly)
    blocks = min(figure("; Occupancy") * SIMDS // warps, SHARED_PER_BLOCK[arch] // max(shared, 1))
    return {
        "registers": figure(r"\.vgpr_count"),
        "spill_bytes": figure("; ScratchSize"),
        "text_loop_spills": spills.text,
        "image_loop_spills": spills.images,
        "warps_per_sm": blocks * warps,
        "mma": " ".join(sorted(set(re.findall(r"\bv_(mfma|wmma)_", assembly)))),
        "issued": products_of_amd(assembly, warps),
    }


def cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def all_cases() -> Iterator[tuple[str, str, int | str, int, str]]:
    """Arguments of compile_case for every row of the table."""
    for case, arch, head_dim, dtype in product(CASES, ARCHITECTURES, HEAD_DIMS, RECORDED_DTYPES):
        if "joined" not in case or dtype != "float32":  # flash attention does not support float32
            yield *case, arch, head_dim, dtype


@cache
def read_table() -> tuple[str, dict[tuple[str, str, str], Report]]:
    """The Triton version of the table, and its rows by (kernel, variant, arch)."""

    def cell(name: str, text: str) -> str | int | float | None:
        if name in ("kernel", "variant", "arch", "mma"):
            return text
        return (float if name == "products" else int)(text) if text else None

    with TABLE.open() as file:
        version = file.readline().removeprefix("# Triton ").strip()
        rows = [Report(**{name: cell(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]
    return version, {(row.kernel, row.variant, row.arch): row for row in rows}


def write_table() -> None:
    from tqdm import tqdm  # not needed to collect the tests

    cases = list(all_cases())
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(compile_case, *zip(*cases, strict=True)), total=len(cases), unit="kernel"))
    partial = TABLE.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        file.write(f"# Triton {triton.__version__}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Report))
        writer.writerows(astuple(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, TABLE)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_table()
