"""Triton's interpreter, without what it does again and again: half of its time, for the same results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def each_launch_patches_once() -> Iterator[None]:
    """A launch puts the interpreter's functions in the place of those of triton.language, and takes them away at its
    end. Every call of a device function puts them there once more, and searches the whole module for that; only the
    first from each module finds anything to replace.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # by this launch: the globals of the functions that were called

    def patch_once(function: Callable[..., Any]) -> Any:
        if id(function.__globals__) in patched:
            return None  # which the call of a device function does not look at
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_anew(self: Any, *arguments: Any, **keywords: Any) -> None:
        patched.clear()
        launch(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
