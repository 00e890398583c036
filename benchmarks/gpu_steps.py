"""The steps of `make gpu-check`: what each runs, within how many seconds, and what of it cannot run here."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from valm_kernels.build_info import triton_obstacle

ROOT = Path(__file__).parents[1]
# Often not on PATH: nvcc and compute-sanitizer.
CUDA_BIN = Path("/usr/local/cuda/bin")

# The tests of the GPU code, by file: to collect all others would take each process seconds.
ATTENTION_TESTS = "tests/valm_kernels/visual_fusion/triton/test_gpu.py"
SEARCH_TESTS = "tests/valm_kernels/topk/test_cuda_gpu.py"
# What the sanitizers watch, which makes a kernel many times slower: attention in 16 bits with every argument, with a
# pool and of one query; float32 by slabs; the public searches, and rows that are streamed.
SANITIZED_TESTS = (
    f"{ATTENTION_TESTS}::test_agrees_with_float64_reference[by head, all options-torch.float16]",
    f"{ATTENTION_TESTS}::test_agrees_with_float64_reference[decode-torch.bfloat16]",
    f"{ATTENTION_TESTS}::test_agrees_with_float64_reference[odd wide head-torch.float32]",
    f"{SEARCH_TESTS}::test_public_functions_use_it",
    f"{SEARCH_TESTS}::test_agrees_with_the_reference[166-30000-768-8-float16-False]",
    f"{SEARCH_TESTS}::test_rows_streamed_from_host_memory[float16-64]",
)
ATTENTION = "bench_call_of_valm or bench_prefill or bench_keys_as_values or (bench_attention and bfloat16 and not Flex)"
FLEX = "bench_attention and bfloat16 and Flex"
QUERIES = "bench_context and RN50x16 and bfloat16"
SANITIZERS = ("memcheck", "racecheck")
# An access beyond a tensor stays unseen in PyTorch's own memory pool, which CUDA graphs need.
SANITIZED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
# The tests ask PyTorch for deterministic results, which cuBLAS gives only with this; and they run side by side.
TESTED = (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("OMP_NUM_THREADS", "1"))
COMPILE_TILES, TILES, TESTS_OF_TILES = "compile tiles", "measure tiles", "tests of the measured tiles"
CROSSOVER = "measure the crossover"
FLASH_TESTS = "test_agrees_with_flash_attention_for_the_text"
# Seconds on one core to compile the kernels of a step, which its processes divide: Triton 3.7.1, for compute capability
# 9.0, on an Intel Xeon with AMX on which nothing else ran. compilations.py measures them.
WORK_S = {"tests": 887, COMPILE_TILES: 1221, TESTS_OF_TILES: 387}
# Seconds in which Python and PyTorch start and pytest collects.
START_S = 5

# The package's measured files, for those that read none: the table and the estimate.
NONE_MEASURED = "none-measured.json"

# What may be missing, and what follows. By the name of the module, or of the program.
OPTIONAL_MODULES = {
    "setuptools": "the native module is not built, so the native top-K is not tested",
    "pytest_timeout": "a test that hangs ends with its step",
    "xdist": "nothing is lost: the tests are divided among processes here",
    "pytest_benchmark": "a plain loop takes the times of calls",
    "hypothesis": "the tests that it draws examples for are skipped; none of them needs a card",
    "pybind11": "PyTorch's headers of it are taken",
    "ninja": "every source is compiled each time",
    "faiss": "no row of faiss-gpu",
    "cuvs": "no row of cuVS",
    "flash_attn_interface": "no row of FlashAttention-3",
}
OPTIONAL_PROGRAMS = {
    "nvcc": "the CUDA part of the native module is not built, so the native top-K of CUDA is not tested",
    "compute-sanitizer": "no sanitizers",
}


@dataclass(frozen=True)
class Step:
    """Commands that run side by side. tests: they are of pytest with the plugin outcomes.py.

    always: also where an earlier run did it, because what it makes does not stay with the results. reads: what other
    steps have written. makes: files that count no longer where what it is given has changed
    (`given_to`), beside those of its tests. skipped: why it cannot run here.
    """

    name: str
    budget_s: int
    commands: tuple[tuple[str, ...], ...]
    environment: tuple[tuple[str, str], ...] = ()
    tests: bool = False
    always: bool = False
    reads: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()
    skipped: str = ""


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def outcome_files(folder: Path, step: Step) -> list[Path]:
    """Where the tests of a step are noted; none where it has no tests."""
    files = [command[command.index("--outcomes") + 1] for command in step.commands if "--outcomes" in command]
    return [folder / Path(file).name for file in dict.fromkeys(files)]


def plan(folder: Path, arch: int, processes: int, run: int = 0) -> list[Step]:
    """All steps on a card of compute capability `arch`, with their results in `folder`."""
    tune = (sys.executable, "-m", "benchmarks.valm_kernels.tune_tiles")
    # beside the compiled kernels: a folder of results may be brought along without them
    compiled = triton_cache() / f"gpu-check-{folder.name}.csv"

    def pytest(name: str, *arguments: str) -> tuple[str, ...]:
        noted = ("--outcomes", str(folder / f"{slug(name)}.outcomes.csv"), "--run-number", str(run))
        plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "benchmarks.outcomes")
        return (sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *plugins, *noted, *arguments)

    def tests(name: str, *arguments: str) -> Step:
        commands = (pytest(name, "--shared", *arguments),) * processes
        return Step(name, shared_s(name, processes), commands, TESTED, tests=True)

    def benchmark(name: str, budget_s: int, file: str, *arguments: str, skipped: str = "") -> Step:
        rows = rows_of(folder, name)
        command = pytest(name, f"benchmarks/{file}", "--results", str(rows), "--device", "cuda", *arguments)
        return Step(name, budget_s, (command,), tests=True, makes=(rows,), skipped=skipped)

    def sanitizer(tool: str) -> tuple[str, ...]:
        options = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all")
        return (*options, *pytest(f"sanitizers {tool}", *SANITIZED_TESTS))

    no_sanitizer = "" if program("compute-sanitizer") else "there is no compute-sanitizer"
    no_model = why_no_model()
    return [
        Step(
            "build",
            40,
            ((sys.executable, "setup.py", "build_ext", "--inplace"),),
            (("VALM_KERNELS_CUDA_ARCH", str(arch)),),
            always=True,
        ),
        tests("tests", ATTENTION_TESTS, SEARCH_TESTS),
        Step(
            COMPILE_TILES,
            shared_s(COMPILE_TILES, processes),
            ((*tune, "compile", str(compiled), "--arch", str(arch)),) * processes,
            (("OMP_NUM_THREADS", "1"),),
            always=True,
        ),
        Step(TILES, 40, ((*tune, "measure", str(compiled), str(folder)),), reads=(compiled,)),
        tests(TESTS_OF_TILES, "-k", f"large_problems or {FLASH_TESTS}", ATTENTION_TESTS),
        Step(
            CROSSOVER,
            20,
            ((sys.executable, "-m", "benchmarks.valm_kernels.measure_crossover", str(folder)),),
            makes=(folder / "crossover.csv", folder / "crossover.json"),
        ),
        benchmark("attention", 45, "valm_kernels/bench_visual_fusion.py", "-k", ATTENTION),
        benchmark("long attention and decoding", 35, "valm_kernels/bench_long_attention.py"),
        benchmark("top-K", 40, "valm_kernels/bench_topk.py", "-k", "on_cuda"),
        benchmark("context queries", 15, "valm/bench_retrieval.py", "-k", QUERIES, skipped=no_model),
        benchmark("training step", 15, "valm/bench_training.py", skipped=no_model),
        benchmark("generation", 15, "valm/bench_generation.py", skipped=no_model),
        Step(
            "sanitizers",
            40,
            tuple(map(sanitizer, SANITIZERS)),
            (*SANITIZED, *TESTED),
            tests=True,
            skipped=no_sanitizer,
        ),
        # last, because it compiles for as long as all other attention
        benchmark("FlexAttention", 35, "valm_kernels/bench_visual_fusion.py", "-k", FLEX),
    ]


def shared_s(name: str, processes: int) -> int:
    """The budget of a step whose work is divided among processes."""
    return START_S + math.ceil(WORK_S[name] / processes)


def rows_of(folder: Path, name: str) -> Path:
    """Where the rows of a benchmark's step are."""
    return folder / f"{slug(name)}.rows.csv"


def triton_cache() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


def program(name: str) -> str | None:
    return shutil.which(name, path=search_path())


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(CUDA_BIN)])


def missing() -> dict[str, str]:
    """What is not here of what may be missing, and what follows."""
    modules = {name: text for name, text in OPTIONAL_MODULES.items() if importlib.util.find_spec(name) is None}
    programs = {name: text for name, text in OPTIONAL_PROGRAMS.items() if program(name) is None}
    obstacle = triton_obstacle()
    return modules | programs | ({"Triton": f"no attention on a GPU: {obstacle}"} if obstacle else {})


def why_no_model() -> str:
    """Why the package valm, and with it the benchmarks of the model, cannot run here; empty if it can."""
    from packaging.requirements import Requirement

    listed = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    found = []
    for text in re.findall(r'^\s*"(.+?)"', listed[1], re.M):
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is missing")
        else:
            if not requirement.specifier.contains(here, prereleases=True):
                found.append(f"{requirement.name} is {here}, not {requirement.specifier}")
    if found:
        return "the package valm cannot run here: " + ", ".join(found)
    # a package that is there may still not be importable
    code = "import open_clip, transformers, valm.model.gpt2, valm.clip.clip"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return (done.returncode and f"the package valm cannot run here: {done.stderr.strip().splitlines()[-1]}") or ""
