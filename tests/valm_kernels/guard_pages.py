"""Tensors next to forbidden pages of memory: an access outside of such a tensor ends the process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Literal

import pytest
import torch

_PROT_NONE = 0

needs_guard_pages = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is called as on Linux")


def guarded(tensor: torch.Tensor, side: Literal["before", "after"]) -> torch.Tensor:
    """A contiguous copy that begins where a forbidden page ends, or ends where one begins."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    last = (-(-size // page) + 1) * page
    memory = mmap.mmap(-1, last + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for offset in (0, last):
        if libc.mprotect(ctypes.c_void_p(address + offset), ctypes.c_size_t(page), _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = page if side == "before" else last - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
    return copy.copy_(tensor)
