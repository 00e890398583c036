"""Launches the Triton kernels through Triton's own binder, compiler and C launcher, on a driver that runs nothing.

test_fake_driver.py starts it, with fake_libcuda.c built as libcuda.so.1 in FOLDER:

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python -m tests.checks.triton.on_fake_driver parameters
    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python -m tests.checks.triton.on_fake_driver repeated
    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python -m tests.checks.triton.on_fake_driver cache
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import mangle_type

from benchmarks.valm_kernels import tune_tiles
from tests.checks.triton.compile_record import KERNELS, specialise
from tests.valm_kernels.visual_fusion.problems import PROBLEMS, Problem
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import Gradients
from valm_kernels.visual_fusion.layout import empty_image_scores
from valm_kernels.visual_fusion.triton import backward, forward
from valm_kernels.visual_fusion.triton import launch as launchers

ARCH = 90
# Together they launch every kernel, with every argument.
LAUNCHED = (
    "dense",
    "pooled",
    "documents",
    "decode",
    "by head, all options",
    "cache_seqlens, documents",
    "image weights, pooled",
    "no images",
)
# Of a parameter, by its type in the signature and in PTX.
BYTES = {"i32": 4, "i64": 8, "fp32": 4}
PTX_BYTES = {"u64": 8, "b64": 8, "s64": 8, "u32": 4, "b32": 4, "s32": 4, "f32": 4}
# Behind the kernel's own parameters: the pointers to Triton's scratch memory.
SCRATCH = 2


@dataclass
class Launches:
    """The kernels that were launched, the handles of their functions, and those for which Triton examined arguments."""

    kernels: list[str] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    by_triton: list[str] = field(default_factory=list)


def build(folder: str | Path) -> None:
    """Builds the driver, libcuda.so.1, with gcc."""
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    source = Path(__file__).with_name("fake_libcuda.c")
    subprocess.run([*command, str(source), "-o", str(Path(folder) / "libcuda.so.1")], check=True)


def environment(folder: str | Path) -> dict[str, str]:
    """The environment of a process that compiles kernels and finds the driver in `folder`."""
    found = os.environ | {"LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    found.pop("TRITON_INTERPRET", None)
    return found


class FakeDriver(nvidia.CudaDriver):
    """Triton's driver of a GPU of compute capability ARCH, without PyTorch's CUDA."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_device_capability = lambda device: divmod(ARCH, 10)
        self.get_current_stream = self.get_current_device = lambda *_: 0
        self.set_current_device = lambda device: None


def flat(nested: Any) -> Iterator[Any]:
    for one in nested:
        if isinstance(one, tuple):
            yield from flat(one)
        else:
            yield one


def as_type(value: int, kind: str) -> float:
    """A parameter of 8 bytes as a number of the signature's type."""
    letter = {"i32": "i", "i64": "q", "fp32": "f"}[kind]
    return struct.unpack(letter, struct.pack("Q", value)[: BYTES[kind]])[0]


def item(nested: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        nested = nested[index]
    return nested


def check_compiled_for(source: Any, arguments: tuple[Any, ...], name: str) -> None:
    """The launched variant was compiled for arguments as these: their types, constants and multiples of 16."""
    for kind, value in zip(flat(source.signature.values()), flat(arguments), strict=True):
        assert kind == "constexpr" or kind == mangle_type(value), (name, kind, value)
    for path, value in source.constants.items():
        assert item(arguments, path) == value, (name, path, value)
    for path, attributes in source.attrs.items():
        value = item(arguments, path)
        value = value.data_ptr() if isinstance(value, torch.Tensor) else value
        assert ["tt.divisibility", 16] not in attributes or value % 16 == 0, (name, path, value)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Triton's driver is the fake one, and launchers see a GPU of compute capability ARCH with an H100's processors."""
    triton.runtime.driver.set_active(FakeDriver())
    with (
        mock.patch.object(launchers, "architecture", lambda device: ARCH),
        mock.patch.object(forward, "multiprocessors", lambda device: 132),
    ):
        yield


@contextmanager
def on_fake_gpu() -> Iterator[Launches]:
    """Launches go to the fake driver, where each parameter that arrives is compared with what was passed."""
    fake: Any = ctypes.CDLL("libcuda.so.1")
    fake.fake_values.restype = ctypes.POINTER(ctypes.c_uint64)
    fake.fake_config.restype = ctypes.POINTER(ctypes.c_uint)
    launches = Launches()
    of_class, call, run = nvidia.CudaLauncher.__init__, nvidia.CudaLauncher.__call__, triton.JITFunction.run

    def noted(launcher: Any, source: Any, metadata: Any) -> None:
        of_class(launcher, source, metadata)
        launcher.source, launcher.name = source, metadata.name
        launcher.threads, launcher.shared = 32 * metadata.num_warps, metadata.shared

    def compared(launcher: Any, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        arguments = rest[4:]  # behind two kinds of metadata and two hooks
        check_compiled_for(launcher.source, arguments, launcher.name)
        kinds = list(flat(launcher.source.signature.values()))
        passed = [pair for pair in zip(kinds, flat(arguments), strict=True) if pair[0] != "constexpr"]
        fake.fake_expect(len(passed) + SCRATCH)
        call(launcher, x, y, z, stream, function, *rest)
        arrived = fake.fake_values()
        for number, (kind, value) in enumerate(passed):
            if kind.startswith("*"):
                assert arrived[number] == value.data_ptr(), (launcher.name, number)
            else:
                expected = struct.unpack("f", struct.pack("f", value))[0] if kind == "fp32" else value
                assert as_type(arrived[number], kind) == expected, (launcher.name, number, kind)
        config = fake.fake_config()
        assert [config[i] for i in range(5)] == [x, y, z, launcher.threads, launcher.shared], launcher.name
        launches.kernels.append(launcher.name)
        launches.functions.append(function)

    def examined(kernel: Any, *arguments: Any, **options: Any) -> Any:
        launches.by_triton.append(kernel.__name__)
        return run(kernel, *arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(fake_gpu())
        stack.enter_context(mock.patch.object(nvidia.CudaLauncher, "__init__", noted))
        stack.enter_context(mock.patch.object(nvidia.CudaLauncher, "__call__", compared))
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", examined))
        yield launches


def check_parameters() -> None:
    """Every kernel of forward and backward is launched, and each parameter arrives as it was passed."""
    with on_fake_gpu() as launches:
        for name in LAUNCHED:
            for dtype in (torch.bfloat16, torch.float32) if name == "dense" else (torch.bfloat16,):
                solve(PROBLEMS[name].inputs(dtype), PROBLEMS[name].weights)
    names = {kernel for _, kernel in KERNELS.values()}
    assert names == set(launches.kernels), names ^ set(launches.kernels)
    print("launched", len(launches.kernels), "agree", check_compiled())


def solve(given: dict[str, Any], weights: bool = False) -> None:
    """Forward and backward of `visual_fusion_attn` for these arguments."""
    inputs = checked_inputs(**given)._replace(cu_seqlens=None)
    scores = empty_image_scores(inputs, wanted=True) if weights else None
    out, lse = forward.forward(inputs, scores)
    results = (out.nan_to_num(), lse.nan_to_num())
    needed = [True] * len(Gradients._fields)
    backward.backward(torch.ones_like(out), torch.zeros_like(lse), scores, *results, inputs, needed)


def calls() -> Iterator[dict[str, Any]]:
    """Calls that differ in what Triton may examine: alignment, strides, sizes of 1, strides of 64 bits."""
    odd = Problem(head_dim=20, pool_size=11)  # rows of 40 bytes are not aligned
    yield odd.inputs(torch.bfloat16)
    yield {name: shifted(x) if isinstance(x, torch.Tensor) else x for name, x in odd.inputs(torch.bfloat16).items()}
    yield replace(odd, tokens_first=False, num_queries=33).inputs(torch.bfloat16)
    given = replace(odd, batch=1, query_heads=1, kv_heads=1, num_queries=1, num_images=1).inputs(torch.bfloat16)
    yield given
    for far in (2**31 - 1, 2**31, 2**31 + 1):
        k: Any = given["k"]
        yield given | {"k": k.as_strided(k.shape, (far, *k.stride()[1:]))}


def shifted(x: torch.Tensor) -> torch.Tensor:
    """x, one element behind an aligned address."""
    memory = torch.empty(x.untyped_storage().nbytes() // x.element_size() + 1, dtype=x.dtype)
    return memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


def check_repeated() -> None:
    """From the second launch of a variant on, Triton does not examine the arguments, and each parameter arrives."""
    with on_fake_gpu() as launches:

        def functions(given: dict[str, Any], examined: bool | None) -> list[int]:
            """The launched functions. `examined`: whether by Triton, or None, if some are."""
            before = len(launches.kernels), len(launches.by_triton)
            solve(given)
            launched, by_triton = len(launches.kernels) - before[0], len(launches.by_triton) - before[1]
            assert examined is None or by_triton == examined * launched, (launched, by_triton)
            return launches.functions[before[0] :]

        for given in calls():
            assert functions(given, examined=None) == functions(given, examined=False)
        driver: Any = triton.runtime.driver.active
        here = functions(given, examined=False)
        driver.get_current_device = lambda: 1
        elsewhere = functions(given, examined=True)
        assert not set(here) & set(elsewhere)
        assert elsewhere == functions(given, examined=False)
        driver.get_current_device = lambda: 0
        assert here == functions(given, examined=False)
        observed: list[Any] = []
        triton.knobs.runtime.launch_enter_hook.add(observed.append)
        assert here == functions(given, examined=True) and len(observed) == len(here)
        triton.knobs.runtime.launch_enter_hook.remove(observed.append)
        functions(given, examined=False)
    print("launched", len(launches.kernels), "examined by Triton", len(launches.by_triton))


def check_compiled() -> int:
    """Compares the parameters of every compiled variant with those of its signature, and returns how many there are."""
    count = 0
    for module, name in KERNELS.values():
        for compiled in getattr(module, name).device_caches[0][0].values():
            entry = re.search(r"\.visible \.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
            assert entry is not None
            found = [PTX_BYTES[kind] for kind in re.findall(r"\.param \.(\w+)", entry[1])]
            kinds = [kind for kind in flat(compiled.src.signature.values()) if kind != "constexpr"]
            assert found == [8 if kind[0] == "*" else BYTES[kind] for kind in kinds] + [8] * SCRATCH, name
            count += 1
    return count


def check_cache() -> None:
    """What `tune_tiles compile` puts into Triton's cache, in TRITON_CACHE_DIR, is all that a run then looks for."""
    case = tune_tiles.cases()[0]
    for launch in tune_tiles.launches(case, ARCH, None, None):
        special = specialise(launch, ARCH)
        triton.compile(special.source, target=GPUTarget("cuda", ARCH, 32), options=special.options)
    folder = Path(triton.knobs.cache.dir)
    with on_fake_gpu() as launches:
        FakeDriver()  # whose C launcher is compiled into the cache too
        before = set(folder.iterdir())
        case.run(case.inputs("cpu"))
    new = set(folder.iterdir()) - before
    assert not new, new
    print("launched", len(launches.kernels), "found", len(before))


if __name__ == "__main__":
    {"parameters": check_parameters, "repeated": check_repeated, "cache": check_cache}[sys.argv[1]]()
