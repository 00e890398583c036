"""Launches compiled kernels without Triton's binder.

At each launch Triton examines all arguments to find the compiled kernel, which is most of the host's time for a launch.
`launch` finds it by a key that takes less time, and calls it as PyTorch's compiler does. Triton also compares the
module constants that a kernel reads with their values at its compilation; `launch` does not.

This file contains every name of Triton that its documentation lacks. If a version of Triton has other names, Triton
launches as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel


class Compiled(NamedTuple):
    """What a launch takes from Triton's `CompiledKernel`, and the values of the compile-time arguments."""

    kernel: Any  # held, because its id is part of the key
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: list[Any]


_compiled: dict[Any, Compiled] = {}


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Runs `kernel[grid](*arguments, **constants)`.

    Args:
        kernel: from `primitives.kernel`.
        arguments: tensors or None, numbers, tuples of integers or of such tuples, and tuples of tensors or None.
        constants: the compile-time arguments and Triton's options, in the same order at each launch.
    """
    try:
        key = _key(kernel, arguments, constants)
    except AttributeError:  # of Triton
        key = None
    found = None if key is None else _compiled.get(key)
    if found is not None:
        _, run, function, metadata, values = found
        driver, device = key[1:3]
        run(*grid, driver.get_current_stream(device), function, metadata, None, None, None, *arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants)
    if key is not None and isinstance(compiled, CompiledKernel):
        with suppress(AttributeError):
            values = [constants[name] for name in kernel.arg_names[len(arguments) :]]
            _compiled[key] = Compiled(kernel, compiled.run, compiled.function, compiled.packed_metadata, values)


def _key(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Equal keys, equal code: the device, Triton's settings, what it examines of the arguments, and the constants.

    None if Triton must launch: an interpreted kernel; hooks; AMD GPUs, where Triton examines the sizes of tensors too.
    """
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    if not isinstance(kernel, triton.JITFunction) or kernel.pre_run_hooks or hooks or torch.version.hip is not None:
        return None
    driver = triton.runtime.driver.active
    inspect_stages = getattr(runtime, "add_stages_inspection_hook", None)  # from Triton 3.6 on
    return (
        id(kernel),
        driver,
        driver.get_current_device(),
        runtime.debug,
        getattr(triton.knobs.compilation, "instrumentation_mode", None),  # from Triton 3.6 on
        inspect_stages and inspect_stages(),
        *[
            x.dtype
            if type(x) is Tensor
            else x
            if x is None
            else x >> 31  # 0: an int32
            if type(x) is int
            else float
            if type(x) is float
            else _examined(x)
            for x in arguments
        ],
        *constants.values(),
    )


def _examined(x: Any) -> Any:
    """What Triton examines of any other argument."""
    if isinstance(x, tuple):
        of_tensors = x[0] is None or isinstance(x[0], Tensor)
        return tuple([t if t is None else (t.dtype, t.data_ptr() % 16) for t in x]) if of_tensors else _strides(x)
    return x.dtype if isinstance(x, Tensor) else (type(x), x)  # a subclass, such as a parameter of a module


@lru_cache(maxsize=1024)  # during generation the strides of growing keys are new at every step
def _strides(x: Any) -> str:
    """What Triton examines of an integer in a tuple: whether it is 1, a multiple of 16, an int32."""
    if isinstance(x, tuple):
        return f"({','.join(map(_strides, x))})"
    return "one" if x == 1 else f"{x >> 31}{'' if x % 16 else 'D'}"
