"""Finds races between streams without a device that has any.

`Streams` replaces torch.cuda. Everything runs immediately on the CPU, so its events order nothing, but they carry
vector clocks. Inside `Streams.watch(host_memory)` each operation on a tensor is compared with earlier operations on its
memory. If one of the two writes and no event orders them, that is a race, whatever its result here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]
HOST = "host"


def joined(a: Clock, b: Clock) -> Clock:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in a | b}


class Streams:
    """The streams and events of a device module. `deaf` names the method that does not wait."""

    def __init__(self, deaf: str | None = None) -> None:
        streams, self.clocks, self.current, self.races = self, {HOST: {HOST: 1}}, "default", set()

        class Stream:
            def __init__(self, device: torch.device | None = None, name: str | None = None) -> None:
                self.name = name or f"stream {len(streams.clocks)}"
                streams.clocks.setdefault(self.name, {})

            def wait_event(self, event: Event) -> None:
                if deaf != f"{self.name}.wait_event":
                    streams.clocks[self.name] = joined(streams.clocks[self.name], event.clock)

        class Event:
            def __init__(self) -> None:
                self.clock: Clock = {}

            def record(self, stream: Stream) -> None:
                self.clock = dict(streams.clocks[stream.name])

            def synchronize(self) -> None:
                if deaf != "synchronize":
                    streams.clocks[HOST] = joined(streams.clocks[HOST], self.clock)

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device: torch.device) -> object:
        return self.Stream(name=self.current)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def tick(self, agent: str) -> Clock:
        """A new time on the agent's clock. The host's earlier work precedes the work that it now gives to a stream."""
        clock = joined(self.clocks.setdefault(agent, {}), self.clocks[HOST])
        clock[agent] = clock.get(agent, 0) + 1
        self.clocks[agent] = clock
        return clock

    def watch(self, host_memory: list[torch.Tensor]) -> TorchDispatchMode:
        """Operations on `host_memory`, or on no tensor, belong to the host, all others to the current stream."""
        host = {tensor.untyped_storage().data_ptr() for tensor in host_memory}
        # for each storage: its users, the time of each use, and whether it wrote; storages stay alive
        uses: dict[int, list[tuple[str, int, bool]]] = {}
        kept = []
        streams = self

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                result = function(*arguments, **(options or {}))
                if function.is_view:
                    return result
                writes, reads = set(), set()
                for argument, value in zip(function._schema.arguments, arguments, strict=False):
                    written = argument.alias_info is not None and argument.alias_info.is_write
                    (writes if written else reads).update(storages(value))
                writes |= storages(result)
                if function is torch.ops.aten.empty_like.default:  # takes the shape, and memory of the current stream
                    agent, reads = streams.current, set()
                else:
                    agent = HOST if not reads or reads & host else streams.current
                clock = streams.tick(agent)
                for storage in reads | writes:
                    for other, time, wrote in uses.setdefault(storage, []):
                        if (wrote or storage in writes) and clock.get(other, 0) < time:
                            streams.races.add((other, agent))
                    uses[storage].append((agent, clock[agent], storage in writes))
                return result

        def storages(value: object) -> set[int]:
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            kept.extend(tensors)
            return {tensor.untyped_storage().data_ptr() for tensor in tensors}

        return Watch()
