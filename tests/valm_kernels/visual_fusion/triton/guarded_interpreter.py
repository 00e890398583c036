"""Triton's interpreter as a stricter machine: it raises errors where a GPU would go wrong in silence.

`guarded` checks every access to memory. An access must be within a tensor of the launch. Numbers must be aligned to
their size, and rows as the kernel promised to the compiler. No program may read or write what another program of the
launch wrote, or write what another program read. Programs run in a shuffled order, because a GPU does not order them.
bfloat16 products are right here; the interpreter computes them from the bits as if they were integers. Rounding to
bfloat16 is right too; the interpreter truncates. float32 products lose what the three tf32 terms of a tensor core lose.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY, SEVERAL = -1, -2
# Terms that a tensor core adds at once; the sum is truncated towards zero.
TF32_STEP = 8


class IllegalAccess(Exception):
    """A kernel did something that a GPU does not guarantee."""


class Memory:
    """The tensors of one launch, and for each number the programs that wrote and read it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        extents = sorted(_extent(t) for t in tensors if t.numel())
        merged: list[list[int]] = []  # views of one tensor share their numbers
        for start, end in extents:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts, self.ends = (np.array([m[i] for m in merged], np.int64) for i in (0, 1))
        sizes = self.ends - self.starts
        self.bases = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
        self.writer, self.reader = (np.full(int(sizes.sum()), NOBODY, np.int32) for _ in range(2))

    def access(self, pointers: TensorHandle, mask: TensorHandle, program: int, writes: bool) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        addresses = np.asarray(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
        region = np.searchsorted(self.starts, addresses, side="right") - 1
        if (region < 0).any() or (addresses + size > self.ends[region]).any():
            raise IllegalAccess(f"{'store' if writes else 'load'} outside of every tensor of the launch")
        if (addresses % size).any():
            raise IllegalAccess(f"address that is no multiple of {size}, the size of its number")
        number = addresses - self.starts[region] + self.bases[region]
        writer, reader = self.writer[number], self.reader[number]
        if ((writer != NOBODY) & (writer != program)).any():
            raise IllegalAccess(f"{'store to' if writes else 'load of'} what another program of the launch stores")
        if not writes:
            self.reader[number] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
        elif ((reader != NOBODY) & (reader != program)).any():
            raise IllegalAccess("store to what another program of the launch loads")
        else:
            self.writer[number] = program


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def guarded(seed: int = 0) -> Iterator[None]:
    """Launches inside raise IllegalAccess, wrapped by Triton in an InterpreterError that names it."""
    shuffle = random.Random(seed).shuffle
    memory, program = Memory([]), 0
    order: Iterator[tuple[int, int, int]] = iter(())
    builder = InterpreterBuilder
    load, store, dot, cast, executor_arguments = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
        builder.cast_impl,
        GridExecutor._init_args_hst,
    )

    def guarded_arguments(self: Any, arguments: Any, keywords: Any) -> Any:
        nonlocal memory
        found = executor_arguments(self, arguments, keywords)
        flat = [x for a in found[0] for x in (a if isinstance(a, tuple) else (a,))]
        memory = Memory([x for x in flat if isinstance(x, torch.Tensor)])
        return found

    def set_grid_dim(self: Any, *grid: int) -> None:
        nonlocal order
        self.grid_dim = grid
        programs = list(product(*(range(size) for size in grid)))
        shuffle(programs)
        order = iter(programs)

    def set_grid_idx(self: Any, *_: int) -> None:
        nonlocal program
        self.grid_idx = next(order)
        x, y, z = self.grid_idx
        program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def guarded_load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        memory.access(pointers, mask, program, writes=False)
        return load(self, pointers, mask, *rest)

    def guarded_store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        memory.access(pointers, mask, program, writes=True)
        return store(self, pointers, value, mask, *rest)

    def exact_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            product = np.matmul(_widened(a.data), _widened(b.data), dtype=np.float32)
        elif a.dtype.scalar == tl.float32:
            product = tf32x3(a.data, b.data)
        else:
            return dot(self, a, b, d, *rest)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def rounding_cast(self: Any, source: TensorHandle, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_narrowed(source.data), tl.bfloat16)
        return cast(self, source, to)

    with ExitStack() as stack:
        for owner, name, replacement in (
            (GridExecutor, "_init_args_hst", guarded_arguments),
            (builder, "set_grid_dim", set_grid_dim),
            (builder, "set_grid_idx", set_grid_idx),
            (builder, "create_masked_load", guarded_load),
            (builder, "create_masked_store", guarded_store),
            (builder, "create_dot", exact_dot),
            (builder, "cast_impl", rounding_cast),
            (TensorHandle, "set_attr", _check_promise),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _check_promise(handle: TensorHandle, name: str, values: list[int]) -> None:
    """tl.multiple_of and tl.max_contiguous of pointers: every group of so many is contiguous and starts on a border."""
    columns = values[-1]
    groups = np.asarray(handle.data).astype(np.int64).reshape(-1, columns)
    if name == "tt.divisibility" and (groups[:, 0] % columns).any():
        raise IllegalAccess(f"pointers promised as multiples of {columns} are none")
    size = np.dtype(interpreter._get_np_dtype(handle.get_element_ty())).itemsize
    if name == "tt.contiguity" and (np.diff(groups, axis=1) != size).any():
        raise IllegalAccess(f"{columns} pointers promised as contiguous are not")


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 numbers, given by their bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(numbers: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16, halves to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)


def tf32x3(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b of float32 as tensor cores compute it in three products of tf32."""
    with np.errstate(invalid="ignore", over="ignore"):
        a_high, b_high = _tf32(a), _tf32(b)
        a_low, b_low = _tf32(a - a_high), _tf32(b - b_high)
        small = _tensor_core(a_high, b_low, _tensor_core(a_low, b_high, np.zeros((), np.float32)))
        # inf - inf of the low parts is NaN; only the high parts matter
        return _tensor_core(a_high, b_high, np.where(np.isnan(small), np.float32(0), small))


def _tf32(x: np.ndarray) -> np.ndarray:
    """x to 10 bits after the leading one, halves away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & ~np.uint32((1 << 13) - 1)).view(np.float32)


def _tensor_core(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    for step in range(0, a.shape[-1], TF32_STEP):
        part = slice(step, step + TF32_STEP)
        exact = total.astype(np.float64) + a[..., part].astype(np.float64) @ b[..., part, :].astype(np.float64)
        total = exact.astype(np.float32)
        too_far = np.abs(total.astype(np.float64)) > np.abs(exact)
        total = np.where(too_far, np.nextafter(total, np.float32(0)), total)
    return total
