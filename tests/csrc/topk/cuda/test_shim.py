"""The shim refuses what a card would not do, or would do wrongly."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from tests.csrc.topk.cuda.simulator import build
from tests.once import made_once

# Kernels of one block of 64 threads that asks for 64 bytes of shared memory.
KERNELS = """
#include "topk/cuda/device.cuh"

using namespace valm;

struct Nothing {};
void sound(Nothing) {
    dynamic_shared()[threadIdx.x % 4].w = threadIdx.x;
    __syncthreads();
    any_in_warp(shuffle_xor(threadIdx.x, 1) == 0);
}
void beyond(Nothing) {
    if (threadIdx.x == 9) dynamic_shared()[4].x = 0;
}
void different(Nothing) {
    if (threadIdx.x % 32 == 5) {
        sync_warp();
    } else {
        any_in_warp(false);
    }
}
void missing(Nothing) {
    if (threadIdx.x % 32 != 5) sync_warp();
}
alignas(16) const uint32_t source[8] = {};
void copied(Nothing) {
    if (threadIdx.x == 9) {
        copy_async(dynamic_shared(), source, true);
        commit_copies();
        wait_copies(0);
    }
}
void not_waited_for(Nothing) {
    if (threadIdx.x == 9) {
        copy_async(dynamic_shared(), source, true);
        commit_copies();
    }
}
void not_aligned(Nothing) {
    if (threadIdx.x == 9) {
        copy_async(dynamic_shared(), source + 1, true);
        commit_copies();
        wait_copies(0);
    }
}
void overflowing(Nothing) {
    int32_t sums[4] = {2147483647, 0, 0, 0};
    const uint32_t ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
    mma<MmaInput::kInt8>(sums, ones, ones[0], ones[1]);
}

extern "C" void run(int kernel, char* message) {
    void (*const kernels[])(Nothing) = {sound,  beyond,         different,   missing,
                                        copied, not_waited_for, not_aligned, overflowing};
    try {
        shim::block.shared_limit = kernel == 8 ? 63 : 64;
        launch(kernels[kernel % 8], dim3(2), 64, 64, {}, Nothing{});
    } catch (const std::exception& error) {
        std::strcpy(message, error.what());
    }
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("the simulated CUDA kernels need g++")

    def make(folder: Path) -> None:
        (folder / "kernels.cpp").write_text(KERNELS)
        build(folder / "kernels.so", driver=folder / "kernels.cpp")

    library = ctypes.CDLL(str(made_once(tmp_path_factory, "shim", make) / "kernels.so"))

    def message(kernel: int) -> str:
        text = ctypes.create_string_buffer(200)
        library.run(kernel, text)
        return text.value.decode()

    return message


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (0, ""),
        (1, "written beyond the shared memory that the launch asked for"),
        (2, "the lanes of a warp meet at different instructions"),
        (3, "deadlock: not all threads meet at a barrier"),
        (4, ""),
        (5, "a thread ends before its copies"),
        (6, "a copy that is not aligned"),
        (7, "an int32 sum overflows"),
        (8, "more shared memory than the card gives a block"),
    ],
)
def test_what_is_wrong_is_said(run, kernel, message):
    assert run(kernel) == message
