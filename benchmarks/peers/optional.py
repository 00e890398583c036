"""Optional packages of the peers."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest


def optional_module(name: str, package: str) -> ModuleType:
    """The module. If it cannot be imported, the benchmark is skipped and names the package."""
    try:
        return import_module(name)
    except ImportError:
        pytest.skip(f"{package} is not installed")
