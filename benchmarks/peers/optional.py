"""Packages that a peer needs and a machine may lack."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest


def optional_module(name: str, package: str) -> ModuleType:
    """The module; where it cannot be imported, the benchmark skips and says which package it needs."""
    try:
        return import_module(name)
    except ImportError:
        pytest.skip(f"{package} is not installed")
