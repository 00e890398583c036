"""Triton's interpreter without its repeated work: half of the time, with equal results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def each_launch_patches_once() -> Iterator[None]:
    """Patches each module once per launch. A launch replaces the functions of triton.language by the interpreter's, and
    restores them at its end. Every call of a device function repeats this and searches its whole module, but only the
    first call from each module finds anything to replace.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # in this launch: the globals of the functions that were called

    def patch_once(function: Callable[..., Any]) -> Any:
        if id(function.__globals__) in patched:
            return None  # the call of a device function ignores the result
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_anew(self: Any, *arguments: Any, **keywords: Any) -> None:
        patched.clear()
        launch(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
