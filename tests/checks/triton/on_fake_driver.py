"""Launches the Triton kernels through Triton's own binder, compiler and C launcher, on a driver that runs nothing.

test_fake_driver.py starts it, with fake_libcuda.c built as libcuda.so.1 in FOLDER:

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python -m tests.checks.triton.on_fake_driver parameters
    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python -m tests.checks.triton.on_fake_driver cache
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from benchmarks.valm_kernels import tune_tiles
from tests.checks.triton.compile_record import KERNELS, specialise
from tests.valm_kernels.visual_fusion.problems import PROBLEMS
from valm_kernels.visual_fusion import api
from valm_kernels.visual_fusion.inputs import TENSOR_NAMES, Gradients
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


@contextmanager
def on_fake_gpu() -> Iterator[list[str]]:
    """Launches go to the fake driver, where each parameter that arrives is compared with what was passed. Yields the
    names of the kernels that were launched."""
    fake: Any = ctypes.CDLL("libcuda.so.1")
    fake.fake_values.restype = ctypes.POINTER(ctypes.c_uint64)
    fake.fake_config.restype = ctypes.POINTER(ctypes.c_uint)
    launched: list[str] = []
    of_class, call = nvidia.CudaLauncher.__init__, nvidia.CudaLauncher.__call__

    def noted(launcher: Any, source: Any, metadata: Any) -> None:
        of_class(launcher, source, metadata)
        launcher.kinds, launcher.name = list(flat(source.signature.values())), metadata.name
        launcher.threads, launcher.shared = 32 * metadata.num_warps, metadata.shared

    def compared(launcher: Any, x: int, y: int, z: int, *rest: Any) -> None:
        arguments = rest[6:]  # behind the stream, the function, two kinds of metadata and two hooks
        kinds = [kind for kind in launcher.kinds if kind != "constexpr"]
        passed = zip(launcher.kinds, flat(arguments), strict=True)
        passed_values = [value for kind, value in passed if kind != "constexpr"]
        fake.fake_expect(len(kinds) + SCRATCH)
        call(launcher, x, y, z, *rest)
        arrived = fake.fake_values()
        for number, (kind, value) in enumerate(zip(kinds, passed_values, strict=True)):
            if kind.startswith("*"):
                assert arrived[number] == value.data_ptr(), (launcher.name, number)
            else:
                expected = struct.unpack("f", struct.pack("f", value))[0] if kind == "fp32" else value
                assert as_type(arrived[number], kind) == expected, (launcher.name, number, kind)
        config = fake.fake_config()
        assert [config[i] for i in range(5)] == [x, y, z, launcher.threads, launcher.shared], launcher.name
        launched.append(launcher.name)

    triton.runtime.driver.set_active(FakeDriver())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nvidia.CudaLauncher, "__init__", noted))
        stack.enter_context(mock.patch.object(nvidia.CudaLauncher, "__call__", compared))
        stack.enter_context(mock.patch.object(launchers, "architecture", lambda device: ARCH))
        stack.enter_context(mock.patch.object(forward, "multiprocessors", lambda device: 132))
        yield launched


def check_parameters() -> None:
    """Every kernel of forward and backward is launched, and each parameter arrives as it was passed."""
    with on_fake_gpu() as launched:
        for name in LAUNCHED:
            for dtype in (torch.bfloat16, torch.float32) if name == "dense" else (torch.bfloat16,):
                solve(name, dtype)
    names = {kernel for _, kernel in KERNELS.values()}
    assert names == set(launched), names ^ set(launched)
    print("launched", len(launched), "agree", check_compiled())


def solve(name: str, dtype: torch.dtype) -> None:
    """A problem of the tests, forward and backward."""
    problem = PROBLEMS[name]
    given = problem.inputs(dtype)
    tensors = tuple(given.get(name) for name in TENSOR_NAMES)
    inputs = api.checked_inputs(tensors, given.get("causal", True), given.get("scale"), given.get("softcap"))
    inputs = inputs._replace(cu_seqlens=None)
    scores = empty_image_scores(inputs, wanted=True) if problem.weights else None
    out, lse = forward.forward(inputs, scores)
    results = (out.nan_to_num(), lse.nan_to_num())
    needed = [True] * len(Gradients._fields)
    backward.backward(torch.ones_like(out), torch.zeros_like(lse), scores, *results, inputs, needed)


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
    with on_fake_gpu() as launched:
        FakeDriver()  # whose C launcher is compiled into the cache too
        before = set(folder.iterdir())
        case.run(case.inputs("cpu"))
    new = set(folder.iterdir()) - before
    assert not new, new
    print("launched", len(launched), "found", len(before))


if __name__ == "__main__":
    {"parameters": check_parameters, "cache": check_cache}[sys.argv[1]]()
