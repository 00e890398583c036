"""The host's time for one call of `visual_fusion_attn` in Triton: Python, dispatcher, allocations and launches.

    python -m benchmarks.valm_kernels.host_time

The kernels are compiled for an H100 and launched on a driver that runs nothing, which gcc builds. So this needs no GPU.
The tensors are small, because allocation takes longer for larger tensors on a CPU, but not with PyTorch's CUDA
allocator. Each line gives the least and the median of several hundred calls, each after an untimed call. The backward
includes about 35 µs that PyTorch's autograd needs for any operator with as many gradients.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from tests.checks.triton.on_fake_driver import build, environment, fake_gpu
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion import api

CALLS = 400
B, H, T, K, D, U = 1, 12, 32, 2, 64, 50
PREFIX = 8191  # of decoding: long enough to be split


def arguments(layout: str, biases: bool) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16)

    queries, keys = (1, PREFIX + 1) if layout == "decoding" else (T, T)
    found: dict[str, Any] = {"q": normal(B, queries, H, D).transpose(1, 2)}
    found |= {name: normal(B, keys, H, D).transpose(1, 2) for name in "kv"}
    if layout == "pooled":
        found |= {name: normal(U, H, D).transpose(0, 1) for name in ("image_k", "image_v")}
        found["image_index"] = torch.randint(-1, U, (B, T, K))
    else:
        found |= {name: normal(B, queries, K, H, D).permute(0, 3, 1, 2, 4) for name in ("image_k", "image_v")}
    if biases:
        found |= {"image_k_bias": normal(H, D), "image_v_bias": normal(H, D), "image_logit_bias": torch.zeros(H)}
    return found


class Case:
    """A layout and the times of its calls in µs."""

    def __init__(self, layout: str, biases: bool) -> None:
        self.name = f"{layout}, biases" if biases else layout
        self.differentiated = layout != "decoding"
        self.inputs = arguments(layout, biases)
        self.leaves = {name: t.detach().requires_grad_() for name, t in self.inputs.items() if t.is_floating_point()}
        self.grad_out = torch.ones_like(self.inputs["q"])
        self.times: dict[str, list[float]] = {}

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return visual_fusion_attn(**self.inputs, impl="triton")

    def forward_with_gradients(self) -> torch.Tensor:
        return visual_fusion_attn(**self.inputs | self.leaves, impl="triton")

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, list(self.leaves.values()), self.grad_out)

    def measure(self) -> None:
        self.forward()
        self._timed("forward", self.forward)
        if self.differentiated:
            untimed = self.forward_with_gradients()
            out = self._timed("forward with gradients", self.forward_with_gradients)
            self.backward(untimed)
            self._timed("backward", self.backward, out)

    def _timed(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter_ns()
        result = function(*arguments)
        self.times.setdefault(name, []).append((time.perf_counter_ns() - start) / 1e3)
        return result


def measure() -> None:
    torch.set_num_threads(1)
    layouts = [(layout, biases) for layout in ("dense", "pooled") for biases in (False, True)]
    cases = [Case(*layout) for layout in (*layouts, ("decoding", False))]
    with fake_gpu(), mock.patch.object(api, "_choose_impl", lambda impl, q: "triton"):
        for _ in range(CALLS):  # in turns, because other work on the machine changes
            for case in cases:
                case.measure()
    for case in cases:
        for name, times in case.times.items():
            called = f"{case.name}: {name}"
            print(f"{called:60} least {min(times):5.0f} µs, median {statistics.median(times):5.0f} µs")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        command = [sys.executable, "-m", "benchmarks.valm_kernels.host_time", "measure"]
        subprocess.run(command, env=environment(folder), check=True)


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["measure"] else main()
