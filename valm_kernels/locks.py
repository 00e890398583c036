"""A lock for an object that is shared by threads, pickled, copied and forked."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet


class Lock:
    """A `threading.RLock` that pickles and copies as a new one, re-entrant because a signal handler runs on the thread
    that it interrupts. A forked child finds it open: the thread that held it is not in the child.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


_locks: WeakSet[Lock] = WeakSet()


def _open_all() -> None:
    for lock in _locks:
        lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_open_all)
