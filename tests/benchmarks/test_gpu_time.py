"""The GPU's own time of a call, with a stand-in for CUDA's graphs and events."""

import contextlib
import types

import pytest
import torch

from benchmarks import gpu_time
from benchmarks.gpu_time import CALLS, MOST_COPIES, gpu_ms, rotating


def test_copies_have_twice_the_bytes_of_the_cache_and_the_layout_of_the_inputs():
    inputs = (torch.randn(4, 8, 16).transpose(0, 1).requires_grad_(), torch.arange(10))
    size = sum(x.nbytes for x in inputs)
    made = rotating(inputs, 3 * size)
    assert len(made) == 6 and made[0] is inputs
    assert len({x.data_ptr() for copy in made for x in copy}) == 12
    for copy in made[1:]:
        assert [x.stride() for x in copy] == [x.stride() for x in inputs]
        assert [x.requires_grad for x in copy] == [True, False]
        assert all(torch.equal(a, b) for a, b in zip(copy, inputs, strict=True))
    assert len(rotating(inputs, size // 3)) == 1 and len(rotating(inputs, 10**9)) == MOST_COPIES


@pytest.fixture
def cuda(monkeypatch):
    """A GPU that takes 0.25 ms for each call in a graph, and 1 ms for nothing that is not in one."""
    clock = types.SimpleNamespace(ms=0.0, captured=0, called=[], capturing=False)

    class Graph:
        def replay(self):
            clock.ms += 0.25 * clock.captured

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock.ms

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.ms - self.ms

    @contextlib.contextmanager
    def graph(one):
        clock.capturing = True
        yield
        clock.capturing = False

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return clock


@pytest.mark.parametrize(("elements", "copies"), [(100, 5), (10, MOST_COPIES)])
def test_a_call_is_timed_in_a_graph_over_all_copies(cuda, elements, copies):
    def call(x):
        cuda.captured += cuda.capturing
        cuda.called.append(x.data_ptr())

    assert gpu_ms(call, (torch.zeros(elements),), torch.device("cuda")) == pytest.approx(0.25)
    assert cuda.captured == max(CALLS, copies)
    assert len(set(cuda.called)) == copies  # 400 bytes of each, or 40
    assert cuda.ms > gpu_time.MEASUREMENTS * gpu_time.MILLISECONDS
