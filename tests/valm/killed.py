"""Kills a child process during its work, at a point that the test chooses."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SECONDS = 120  # after this time a child counts as hanging


# Audit events before Python changes a folder; `open` counts if it writes.
WRITES = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")


def exit_code_if_killed_at(
    function: Callable[[], Any], folder: Path, point: int, number: signal.Signals = signal.SIGKILL
) -> int:
    """Exit code of a child that runs `killed_at`; 0 if it makes fewer changes."""
    return exit_code(forked(killed_at(function, folder, point, number)))


def killed_at(
    function: Callable[[], Any], folder: Path, point: int, number: signal.Signals = signal.SIGKILL
) -> Callable[[], None]:
    """For a child: runs `function`, and sends itself a signal before the `point`-th (from 0) change of `folder` or of a
    name that begins with it: a file opened for writing, or a name made, moved or removed."""
    root = os.fspath(folder)

    def run() -> None:
        done = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event not in WRITES or not _path(event, arguments).startswith(root):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            done += 1
            if done == point + 1:
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT
        sys.addaudithook(hook)
        function()

    return run


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    """The file of an audit event. shutil.rmtree gives names relative to the folder that it has opened."""
    name = arguments[event == "os.link"]  # the new name
    if not isinstance(name, str):
        return ""
    if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), name)
    return name


def exit_code(process: multiprocessing.Process) -> int:
    """The exit code of a started child, once it has ended."""
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"the child still ran after {SECONDS} s")
    assert process.exitcode is not None
    return process.exitcode


def forked(function: Callable[[], Any]) -> multiprocessing.Process:
    """A started child that runs `function` on one thread: a fork copies no other threads, but OpenMP waits for them.

    The child does not collect its parent's garbage, because a faiss index would join threads that the child lacks.
    """

    def run() -> None:
        gc.freeze()
        torch.set_num_threads(1)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def exit_code_if_killed(function: Callable[[], Any], point: int, calls: tuple = ((os, "replace"),)) -> int:
    """Exit code of a child that runs `function` and kills itself before its `point`-th (from 0) call of `calls`. Each
    of `calls` is an object and the name of its function; by default the call that finishes a file."""

    def run() -> None:
        done = 0

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **named: Any) -> Any:
                nonlocal done
                if done == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return original(*arguments, **named)

            return called

        for owner, name in calls:
            setattr(owner, name, counting(getattr(owner, name)))
        function()

    return exit_code(forked(run))


def is_running(pid: int) -> bool:
    """Whether a process runs and is no zombie. Linux only."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def still_running(pids: list[int], seconds: float = 10) -> list[int]:
    """The processes of `pids` that still run after this time; kills them."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left
