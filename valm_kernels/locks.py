"""A lock for an object that is shared by threads, pickled, copied and forked."""

from __future__ import annotations

import os
from _thread import RLock
from typing import Any
from weakref import WeakSet


class Lock(RLock):  # type: ignore[misc]  # final only in typeshed
    """A `threading.RLock` whose pickles and copies are new, open locks. In a forked child it is open, because the
    thread that held it is not in the child.

    It is re-entrant because a signal handler runs on the thread that it interrupts. It enters and leaves in the base
    class's C code: in Python code, an exception from a signal handler could leave it locked.
    """

    def __init__(self) -> None:
        _locks.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


_locks: WeakSet[Lock] = WeakSet()


def _open_all() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_open_all)
