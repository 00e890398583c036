"""A signal that arrives while native code runs, and ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest


class Stopped(Exception):
    """Raised by the signal's handler."""


def stop_in_native_code(call: Callable[[Callable[[], None]], Any]) -> None:
    """Calls `call(begin)`, which calls `begin` right before native code: another thread then sends a signal, which
    has its turn only where the GIL is released, and the signal's handler ends the call."""

    def stop(*_: object) -> None:
        raise Stopped

    begun = threading.Event()
    sender = threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGUSR1)))
    before, interval = signal.signal(signal.SIGUSR1, stop), sys.getswitchinterval()
    sender.start()
    try:
        sys.setswitchinterval(1000)
        with pytest.raises(Stopped):
            call(begun.set)
    finally:
        sys.setswitchinterval(interval)
        begun.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
