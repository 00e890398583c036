from __future__ import annotations

import copy
import os
import pickle
import signal

import pytest

from tests.threads import at_once
from valm_kernels.locks import Lock


def is_open(lock: Lock) -> bool:
    """Whether another thread could enter it."""

    def enter() -> bool:
        entered = lock.acquire(blocking=False)
        if entered:
            lock.release()
        return entered

    (found,) = at_once(enter)
    return found


def test_a_thread_that_has_it_enters_again():
    """As its signal handlers do."""
    lock = Lock()
    with lock:
        with lock:
            pass
        assert not is_open(lock)
    assert is_open(lock)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_the_exception_of_a_signal_handler_opens_it():
    """Wherever it comes, while the lock is entered and left too."""

    def stop(*_):
        raise KeyboardInterrupt

    lock, before = Lock(), signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005)
                while True:
                    with lock:
                        pass
            except KeyboardInterrupt:
                assert is_open(lock)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_another_lock(duplicate):
    lock = Lock()
    with lock:
        other = duplicate(lock)
        assert is_open(other)
        with other:
            assert not is_open(lock)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_finds_it_open():
    lock = Lock()
    with lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if is_open(lock) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not is_open(lock)
