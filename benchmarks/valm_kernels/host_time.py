"""The host's time for one call of `visual_fusion_attn` in Triton: Python, dispatcher and allocations.

    TRITON_INTERPRET=1 python -m benchmarks.valm_kernels.host_time

Launches do nothing, so this needs no GPU and leaves out the time of Triton's binder. The tensors are small, because
allocation takes longer for larger tensors on a CPU, but not with PyTorch's CUDA allocator. Each line gives the least
and the median of several hundred calls, each after an untimed call. The backward includes about 35 µs that PyTorch's
autograd needs for any operator with as many gradients.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from valm_kernels import visual_fusion_attn

CALLS = 400
B, H, T, K, D, U = 1, 12, 32, 2, 64, 50
LAYOUTS = ("dense", "pooled")


class NoKernel:
    """Replaces a kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextmanager
def without_launches() -> Iterator[None]:
    from valm_kernels.visual_fusion.triton import backward_key, backward_pool, backward_query, forward

    with ExitStack() as stack:
        for module in (forward, backward_query, backward_key, backward_pool):
            for name in [name for name in vars(module) if name.endswith("_kernel") and name.startswith("_")]:
                stack.enter_context(mock.patch.object(module, name, NoKernel()))
        # an H100's, so that the keys are not split
        stack.enter_context(mock.patch.object(forward, "multiprocessors", lambda device: 1))
        yield


def arguments(layout: str, biases: bool) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16)

    found: dict[str, Any] = {name: normal(B, T, H, D).transpose(1, 2) for name in "qkv"}
    if layout == "dense":
        found |= {name: normal(B, T, K, H, D).permute(0, 3, 1, 2, 4) for name in ("image_k", "image_v")}
    else:
        found |= {name: normal(U, H, D).transpose(0, 1) for name in ("image_k", "image_v")}
        found["image_index"] = torch.randint(-1, U, (B, T, K))
    if biases:
        found |= {"image_k_bias": normal(H, D), "image_v_bias": normal(H, D), "image_logit_bias": torch.zeros(H)}
    return found


class Case:
    """A layout and the times of its calls in µs."""

    def __init__(self, name: str, inputs: dict[str, Any]) -> None:
        self.name = name
        self.inputs = inputs
        self.leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
        self.grad_out = torch.ones_like(inputs["q"])
        self.times: dict[str, list[float]] = {"forward": [], "forward with gradients": [], "backward": []}

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
        untimed = self.forward_with_gradients()
        out = self._timed("forward with gradients", self.forward_with_gradients)
        self.backward(untimed)
        self._timed("backward", self.backward, out)

    def _timed(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter_ns()
        result = function(*arguments)
        self.times[name].append((time.perf_counter_ns() - start) / 1e3)
        return result


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1, without which Triton takes no CPU tensors")
    torch.set_num_threads(1)
    cases = [
        Case(f"{layout}, biases" if biases else layout, arguments(layout, biases))
        for layout in LAYOUTS
        for biases in (False, True)
    ]
    with without_launches():
        for _ in range(CALLS):  # in turns, because other work on the machine changes
            for case in cases:
                case.measure()
    for case in cases:
        for name, times in case.times.items():
            called = f"{case.name}: {name}"
            print(f"{called:60} least {min(times):5.0f} µs, median {statistics.median(times):5.0f} µs")


if __name__ == "__main__":
    main()
