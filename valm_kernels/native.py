"""The compiled part of valm_kernels, imported when it is first needed."""

from __future__ import annotations

from types import ModuleType


def native() -> ModuleType:
    """The module valm_kernels._native.

    Raises:
        ImportError: it is not built, or cannot be loaded here; the message says how to build it.
    """
    # torch first, so that both share its OpenMP runtime and thread pool
    import torch  # noqa: F401

    try:
        from valm_kernels import _native
    except ImportError as error:
        raise ImportError(
            f"the native code of valm_kernels cannot be loaded ({error}). Build it with `pip install -e .` (or "
            "`python setup.py build_ext --inplace`), or choose impl='reference'."
        ) from error
    return _native
