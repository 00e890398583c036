"""Shards written on the machines of a Ray cluster.

Every machine needs valm and must see the same files under the same paths (a network file system). The result equals
that of one machine bit for bit. If a machine is lost, its tasks and actors restart on another machine. A killed driver
resumes after the finished shards.
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

# How often a shard is retried if its machine is lost.
MAX_RETRIES = 10
# Submitted shards for each shard that the cluster can write at once: machines do not wait, and memory suffices.
QUEUED = 2
CONNECT_SECONDS = 10


class RayRun:
    """Writes the shards of a build in Ray tasks: a `run` for knowledge base builds and corpus retrieval.

    Args:
        address: "HOST:PORT" of a cluster, "auto" for the cluster that this machine belongs to, or "local" for only this
            machine. A program that has called `ray.init` stays connected.
        cpus, gpus: the cores and GPUs that a task reserves; torch uses `cpus` threads. Each worker process caches its
            arguments, so a `Retriever` opens its whole index in each process, unless it is a `ShardedIndex`.

    Raises:
        ImportError: ray is not installed.
        ValmError: there is no cluster, or no machine in the cluster can run a task.
    """

    def __init__(self, address: str, *, cpus: int = 1, gpus: float = 0):
        connect(address)
        self.cpus = cpus
        self.gpus = gpus
        if free_tasks(cpus, gpus) == 0:  # Ray would wait for a machine to join
            raise ValmError(
                f"no machine of the Ray cluster has the {cpus} cores and {gpus} GPUs that a task reserves: lower "
                "--cpus, or give --device cpu"
            )

    def __call__(self, work: Task, shards: Iterable[tuple[int, Any]], progress: Progress) -> None:
        """Runs `work` for all `shards`.

        Raises:
            ValmError: `work` raised it on another machine, or Ray gave up on a shard.
        """
        ray = import_ray()
        task = ray.remote(_write_shard).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=MAX_RETRIES)
        shared = [ray.put(work)]  # in a list, so that a process fetches it once and not with every task
        shards = iter(shards)
        pending: list[Any] = []
        try:
            while True:
                at_once = max(1, free_tasks(self.cpus, self.gpus))  # the cluster may have changed
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
    """Joins the Ray cluster at `address`. Errors are those of `RayRun`."""
    ray = import_ray()
    if ray.is_initialized():
        return
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # ray takes minutes to notice that there is no cluster
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValmError(f"no Ray cluster at {address!r}: {reason}") from error


class _Tally:
    """Counts the progress of one shard, for the driver."""

    def __init__(self) -> None:
        self.units = self.skipped = 0

    def begin(self, units: int) -> None:
        pass

    def advance(self, units: int, skipped: int = 0) -> None:
        self.units += units
        self.skipped += skipped


def _write_shard(shared: list[Any], number: int, part: Any) -> tuple[int, int]:
    """A task that writes shard `number`; returns its units of work, and how many of them could not be read."""
    tally = _Tally()
    _fetch(shared[0])(number, part, tally)
    return tally.units, tally.skipped


@functools.lru_cache(maxsize=1)
def _fetch(reference: Any) -> Task:
    return import_ray().get(reference)


def free_tasks(cpus: int, gpus: float = 0) -> int:
    """The number of tasks with these reservations that the cluster can currently run at once."""
    have = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
    each = [(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf) for node in have]
    return int(sum(map(min, each)))


def task_result(reference: Any, what: str) -> Any:
    """The result of a task or an actor. Raises ValmError if the task did, or if Ray gave up on it."""
    ray = import_ray()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValmError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:  # out of memory, crashed too often, an actor that cannot start
        lines = str(error).strip().splitlines()
        # the error is in the last line if an actor cannot start, otherwise in the first
        reason = lines[-1 if isinstance(error, ray.exceptions.ActorDiedError) else 0]
        raise ValmError(
            f"Ray gave up on {what}: {reason} ({type(error).__name__}). Once that is fixed, run the same command "
            "again: it resumes"
        ) from error


def import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ImportError("work on a cluster needs ray: pip install -e '.[ray]'") from error
    return ray
