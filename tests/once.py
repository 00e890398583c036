"""Makes folders once for all processes of a test run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`. The first process that asks for it fills it with `make`, and the others wait. No process may
    change it later.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the run's folder, which contains a folder for each worker
    folder, filled = root / name, root / f"{name}.filled"
    with FileLock(root / f"{name}.lock"):
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a process left that failed
            folder.mkdir()
            make(folder)
            filled.touch()
    return folder
