"""The compiled module, imported on first use, with its instruction set and threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch  # before the module, so that both share one OpenMP runtime and thread pool

P = ParamSpec("P")
R = TypeVar("R")
_process = os.getpid()

# The number in csrc/bindings.cpp: raised when a call there changes.
INTERFACE_VERSION = 10


def native() -> ModuleType:
    """The compiled module `_native`, whose functions take the addresses of tensors.

    Raises:
        ImportError: the module is not built, cannot be loaded, or its version differs from the Python code's. The
            message says how to build it.
        NotImplementedError: inside a transform of torch.func, where a tensor's address may be 0. Operators are called
            outside of the transform.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "this function of valm_kernels cannot run inside a transform of torch.func (vmap, grad, functionalize): "
            "call it before. visual_fusion_attn, ip_topk and FlatIPIndex.search can run inside"
        )
    return _module()


@cache
def _module() -> ModuleType:
    try:
        module = import_module(f"{__package__}._native")
    except ImportError as error:
        if __package__ != "valm_kernels" and isinstance(error, ModuleNotFoundError):
            raise ImportError(
                f"this copy of valm_kernels ({Path(__file__).parent}) has no native code, because kernel hubs ship "
                "only Python. Choose impl='reference' if the function takes it, or install valm with pip and import "
                "valm_kernels."
            ) from error
        raise ImportError(
            f"the native code of valm_kernels cannot be loaded ({error}). Build it with `pip install -e .` (or `python "
            "setup.py build_ext --inplace`) unless memory ran out, or choose impl='reference'."
        ) from error
    version = getattr(module, "interface_version", "none")
    if version != INTERFACE_VERSION:
        raise ImportError(
            f"the native code and the Python code of valm_kernels differ in version: {module.__file__} has interface "
            f"version {version}, expected {INTERFACE_VERSION}. Build it again with `pip install -e .` (or `python "
            "setup.py build_ext --inplace`)."
        )
    return module


def cpu_isa() -> str:
    """The instruction set of all native CPU code: VALM_KERNELS_ISA, or by default the best of this machine.

    Raises:
        ValueError: this machine does not support VALM_KERNELS_ISA; the message lists the supported values.
    """
    return _usable_isa(os.environ.get("VALM_KERNELS_ISA"))


@cache
def _usable_isa(asked: str | None) -> str:
    usable = _module().cpu_isas()
    if asked is None:
        return usable[0]
    if asked not in usable:
        raise ValueError(f"VALM_KERNELS_ISA is {asked!r}, this machine runs {', '.join(usable)}")
    return asked


def survives_fork(function: Callable[P, R]) -> Callable[P, R]:
    """Makes `function` run on one thread in a forked child, in native code and in PyTorch's operations.

    OpenMP's threads do not survive a fork, and a child that used them would wait forever. Compiled graphs are not
    guarded.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        threads = torch.get_num_threads()
        if os.getpid() == _process or threads == 1:
            return function(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return guarded
