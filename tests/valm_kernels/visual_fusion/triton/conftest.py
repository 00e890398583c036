"""Triton's interpreter without its repeated work: a third of the time, with equal results."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", autouse=INTERPRETED)
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


@pytest.fixture(scope="session", autouse=INTERPRETED)
def overflow_is_not_looked_for() -> Iterator[None]:
    """Turns off a check that cannot fail. The interpreter computes each sum and product of int32 again in int64 and
    compares it with the limits of int32, but ignores the comparison, because its option `debug` is off."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(scope="session", autouse=INTERPRETED)
def each_shape_is_made_once() -> Iterator[None]:
    """Remembers the shapes of tensors: Triton makes an object for every tensor's shape, and for each size in it."""
    from triton.language import core

    @cache
    def shape_and_count(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def initialise(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_count(tuple(type.shape) if type.is_block() else ())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(core.tensor, "__init__", initialise)
        yield


@pytest.fixture(scope="session", autouse=INTERPRETED)
def each_dtype_is_looked_up_once() -> Iterator[None]:
    """Remembers NumPy's dtype of each of Triton's: the interpreter builds its table of them for every operation."""
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def look_up_once(dtype: Any) -> Any:
        scalar = dtype.scalar  # pointers and blocks cannot be hashed, hence the name
        if scalar.name not in found:
            found[scalar.name] = look_up(scalar)
        return found[scalar.name]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_get_np_dtype", look_up_once)
        yield


@pytest.fixture(scope="session", autouse=INTERPRETED)
def masks_are_of_bools() -> Iterator[None]:
    """Makes masks NumPy's bools. The interpreter keeps `block & scalar` as int32 where the scalar is known at run time
    only, and from Triton 3.9 on it refuses to load or store by such a mask."""
    from triton.runtime import interpreter

    def of_bools(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            builder, "create_masked_load", lambda self, ptrs, mask, *rest: load(self, ptrs, of_bools(mask), *rest)
        )
        monkeypatch.setattr(
            builder,
            "create_masked_store",
            lambda self, ptrs, value, mask, *rest: store(self, ptrs, value, of_bools(mask), *rest),
        )
        yield
