"""Shards written on the machines of a Ray cluster.

Every machine must have valm installed and see the same files under the same paths (a network file system). The result
is identical to that of one machine. A task or an actor that is lost with its machine is restarted on another one, and a
driver that was killed resumes after the finished shards.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from valm.errors import ValmError
from valm.store.shards import Progress, Task

# How often a shard is retried whose machine was lost.
MAX_RETRIES = 10
# Shards submitted for each that the cluster can write at once: enough that none waits, few enough for memory.
QUEUED = 2
CONNECT_SECONDS = 10


class RayRun:
    """Writes the shards of a build by Ray tasks: a `run` for the builders and corpus retrieval.

    Args:
        address: of a cluster ("auto" for the one this machine is part of, or "HOST:PORT"), or "local" for one of this
            machine alone. A program that has called `ray.init` stays connected as it is.
        cpus, gpus: what a task reserves; torch uses as many threads as it has cpus. Each worker process caches its
            arguments: a `Retriever` opens its whole index in each, unless that is a `ShardedIndex`.

    Raises:
        ImportError: ray is not installed.
        ValmError: there is no cluster, or no machine of it has room for a task.
    """

    def __init__(self, address: str, *, cpus: int = 1, gpus: float = 0):
        connect(address)
        self.cpus = cpus
        self.gpus = gpus
        if free_tasks(cpus, gpus) == 0:  # Ray would wait for a machine to join
            raise ValmError(
                f"no machine of the Ray cluster has the {cpus} cores and {gpus} GPUs that a task asks for: give "
                "less --cpus, or --device cpu"
            )

    def __call__(self, work: Task, shards: Iterable[tuple[int, Any]], progress: Progress) -> None:
        """Runs `work` for all `shards`.

        Raises:
            ValmError: `work` raised it on another machine, or Ray gave up on it.
        """
        ray = import_ray()
        task = ray.remote(_write_shard).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=MAX_RETRIES)
        shared = [ray.put(work)]  # in a list, so that each process fetches it once instead of with every task
        shards = iter(shards)
        pending: list[Any] = []
        try:
            while True:
                at_once = max(1, free_tasks(self.cpus, self.gpus))  # as the cluster is now
                while len(pending) < QUEUED * at_once and (shard := next(shards, None)) is not None:
                    pending.append(task.remote(shared, *shard))
                if not pending:
                    break
                (done,), pending = ray.wait(pending)
                units, skipped = task_result(done, "a shard")
                progress.begin(units)
                progress.advance(units, skipped)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def connect(address: str) -> None:
    """Joins the Ray cluster at `address`; errors as `RayRun`."""
    ray = import_ray()
    if ray.is_initialized():
        return
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # ray itself takes minutes to notice that there is no cluster
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValmError(f"no Ray cluster at {address!r}: {reason}") from error


class _Tally:
    """The progress of one shard, to be reported to the driver."""

    def __init__(self) -> None:
        self.units = self.skipped = 0

    def begin(self, units: int) -> None:
        pass

    def advance(self, units: int, skipped: int = 0) -> None:
        self.units += units
        self.skipped += skipped


def _write_shard(shared: list[Any], number: int, part: Any) -> tuple[int, int]:
    """A task: units of work done for shard `number`, and how many of them could not be read."""
    tally = _Tally()
    _fetch(shared[0])(number, part, tally)
    return tally.units, tally.skipped


@functools.lru_cache(maxsize=1)
def _fetch(reference: Any) -> Task:
    return import_ray().get(reference)


def free_tasks(cpus: int, gpus: float = 0) -> int:
    """How many tasks of these reservations the cluster can currently run at once."""
    have = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
    each = [(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf) for node in have]
    return int(sum(map(min, each)))


def task_result(reference: Any, what: str) -> Any:
    """The result of a task or an actor.

    Raises:
        ValmError: the task raised it, or Ray gave up on it.
    """
    ray = import_ray()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValmError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:  # killed for its memory, crashed too often, an actor that cannot start
        lines = str(error).strip().splitlines()
        # if an actor cannot start, the last line has its error, otherwise the first line does
        reason = lines[-1 if isinstance(error, ray.exceptions.ActorDiedError) else 0]
        raise ValmError(
            f"{what} was given up on the Ray cluster: {reason} ({type(error).__name__}); once that is mended, run the "
            "same command again: it resumes"
        ) from error


def import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ImportError("work on a cluster needs ray: pip install -e '.[ray]'") from error
    return ray
