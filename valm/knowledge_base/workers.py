"""Processes that end with their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

# prctl(2), of Linux
PR_SET_PDEATHSIG = 1


def end_with_parent(worker: int = 0) -> None:
    """Makes this process end when its parent is killed. A DataLoader calls it in worker number `worker`.

    PyTorch's own workers may stay: they write to pipes whose read ends other workers hold open too, so they wait
    forever for a reader.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # the main process itself
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent.pid:  # the parent was killed before that
            os._exit(1)
    else:

        def wait() -> None:
            parent.join()  # on a pipe that closes with it
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
