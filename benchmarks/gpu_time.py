"""The time that a call takes on the GPU alone: without its host, and without inputs that L2 has from the call before.

Calls on copies of the inputs in turn are captured in a CUDA graph, which is replayed between two events.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Calls of a graph at the least, and copies of the inputs at the most.
CALLS, MOST_COPIES = 8, 32
# A measurement replays the graph for so long, so that what starts the first replay hardly counts.
MILLISECONDS, MOST_REPLAYS = 5.0, 200
MEASUREMENTS = 5


def rotating(inputs: tuple[Tensor, ...], cache_bytes: int) -> list[tuple[Tensor, ...]]:
    """The inputs, and as many copies of them as together have twice the bytes of the cache."""
    copies = math.ceil(2 * cache_bytes / max(1, sum(x.nbytes for x in inputs)))
    made = [inputs]
    for _ in range(min(copies, MOST_COPIES) - 1):
        made.append(tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs))
    return made


def gpu_ms(function: Callable[..., Any], inputs: tuple[Tensor, ...], device: torch.device) -> float:
    """Median milliseconds of function(*inputs) on the GPU.

    Raises:
        RuntimeError: the call cannot be captured, for instance because it waits for the device.
    """
    turns = rotating(inputs, torch.cuda.get_device_properties(device).L2_cache_size)
    calls = max(CALLS, len(turns))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what a first call makes must not be captured
        function(*turns[-1])
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            function(*turns[number % len(turns)])
    graph.replay()
    first = _replay_ms(graph, 1)
    replays = max(1, min(MOST_REPLAYS, math.ceil(MILLISECONDS / max(first, 1e-3))))
    return statistics.median(_replay_ms(graph, replays) for _ in range(MEASUREMENTS)) / (replays * calls)


def _replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
