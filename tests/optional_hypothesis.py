"""`given`, `settings` and `st` of hypothesis. Without hypothesis, tests with `given` are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Strategies:
        """Returns itself for every attribute, call and |."""

        def __getattr__(self, name: str) -> _Strategies:
            return self

        def __call__(self, *arguments: Any, **options: Any) -> _Strategies:
            return self

        __or__ = __call__

    st = _Strategies()

    def given(*arguments: Any, **options: Any) -> pytest.MarkDecorator:
        return pytest.mark.skip(reason="needs the package hypothesis")

    def settings(*arguments: Any, **options: Any) -> Callable[..., Any]:
        return lambda test: test


__all__ = ["given", "settings", "st"]
