"""Our key of a launch, compared with what Triton's own binder would compile. The launches themselves are tested on a
driver that runs nothing (tests/checks/triton/test_fake_driver.py)."""

import importlib.util
import os
from functools import cache
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process has no compiled kernels", allow_module_level=True)

import triton
import triton.language as tl
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from tests.checks.triton.compile_record import meta_inputs, recorders, specialise, target
from tests.optional_hypothesis import given, settings, st
from tests.valm_kernels.visual_fusion.triton.test_specialisation import decoding_step
from valm_kernels.visual_fusion.inputs import Gradients
from valm_kernels.visual_fusion.triton import backward, compiled, forward
from valm_kernels.visual_fusion.triton.compiled import launch
from valm_kernels.visual_fusion.triton.primitives import kernel

ARCH = 90
TENSORS = (None, *(torch.empty(9, dtype=dtype)[offset:] for dtype in (torch.half, torch.float) for offset in (0, 1, 8)))
# Triton tells apart 1, multiples of 16 and integers of 64 bits.
INTEGERS = (-(2**31) - 1, -16, -1, 0, 1, 8, 16, 2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**32 + 1)
# The values of each part of a launch.
PARTS = (*[TENSORS] * 4, *[INTEGERS] * 7, *[(None, 0.5)] * 2, (False, True), *[(16, 32)] * 2)


@kernel
def _copy_kernel(x, y, results, strides, row_strides, n, scale, cap, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    pass


class Driver:
    """Triton's driver of a GPU, of which only the current device is asked for."""

    def get_current_device(self):
        return 0


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return driver


def key(arguments, constants):
    return compiled._key(_copy_kernel, arguments, constants)


@cache
def binder():
    return create_function_from_signature(_copy_kernel.signature, _copy_kernel.params, make_backend(target(ARCH)))


def examined(arguments, constants):
    """What Triton's binder would look for in its cache."""
    _, specialization, options = binder()(*arguments, **constants)
    return specialization, options


def launch_of(parts):
    x, y, first, second, a, b, c, d, e, f, n, scale, cap, flag, block, stages = parts
    constants = {"FLAG": flag, "BLOCK": block, "num_stages": stages}
    return (x, y, (first, second), ((a, b), (c, d)), (e, f), n, scale, cap), constants


PLAIN = launch_of([values[-1] for values in PARTS])


@settings(max_examples=30, deadline=None)
@given(st.tuples(*map(st.sampled_from, PARTS)))
def test_equal_keys_are_of_equal_code(parts):
    """Compares a launch with all that differ from it in one part."""
    launch, told_apart = launch_of(parts), 0
    for position, values in enumerate(PARTS):
        for value in values:
            other = launch_of((*parts[:position], value, *parts[position + 1 :]))
            if examined(*launch) != examined(*other):
                told_apart += 1
                assert key(*launch) != key(*other), (parts, position, value)
    assert told_apart > len(PARTS)


def test_key_has_what_triton_reads_besides(driver, monkeypatch):
    keys = [key(*PLAIN)]
    with monkeypatch.context() as patch:
        patch.setattr(driver, "get_current_device", lambda: 1)
        keys.append(key(*PLAIN))
    for knobs, name, value in (
        (triton.knobs.runtime, "debug", True),
        (triton.knobs.compilation, "instrumentation_mode", "fpsan"),
        (triton.knobs.runtime, "add_stages_inspection_hook", lambda: ("stages", "1")),
        (triton.knobs.runtime, "add_stages_inspection_hook", lambda: ("stages", "2")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(knobs, name, value, raising=False)
            keys.append(key(*PLAIN))
    assert len(set(keys)) == len(keys)


def test_hooks_and_other_names_of_triton_leave_the_launch_to_it(monkeypatch):
    def other(*_):
        raise AttributeError("another version of Triton")

    launched = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *_, grid, **__: launched.append(grid))
    monkeypatch.setattr(compiled, "_compiled", SimpleNamespace(get=lambda key: pytest.fail("looked up")))
    for place, name, value in (
        (triton.knobs.runtime.launch_enter_hook, "calls", [print]),
        (triton.knobs.runtime.launch_exit_hook, "calls", [print]),
        (_copy_kernel, "pre_run_hooks", [print]),
        (torch.version, "hip", "7.1"),
        (compiled, "_key", other),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            launch(_copy_kernel, (1, 2, 3), *PLAIN)
    assert launched == [(1, 2, 3)] * 5


def keys_and_variants(launch_all):
    """By kernel, the different keys of the launches and what Triton's binder would tell apart."""
    with recorders(ARCH) as found:
        launch_all()
    return {
        name: (
            {compiled._key(one.kernel, one.arguments, one.keywords) for one in recorder.launches},
            {specialise(one, ARCH).key for one in recorder.launches},
        )
        for name, recorder in found.items()
        if recorder.launches
    }


@pytest.mark.parametrize("pool_size", [None, 16])
def test_a_generation_has_no_more_keys_than_variants(pool_size):
    """With a cache of constant strides, and with one that grows by torch.cat."""

    def generate():
        for num_keys in range(481, 545):
            step = decoding_step(num_keys, pool_size=pool_size)
            forward.forward(step)
            forward.forward(step._replace(k=step.k.contiguous(), v=step.v.contiguous()))

    found = keys_and_variants(generate)
    assert set(found) == {"forward", "merge"}
    for keys, variants in found.values():
        assert len(keys) == len(variants) < 4


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("pooled", [False, True])
def test_launches_have_as_many_keys_as_variants(pooled, head_dim):
    def launch_all():
        for dtype in (torch.float16, torch.float32):
            for options in ({}, {"q_len": 1}, {"k_len": 1031}, {"softcap": 50.0}, {"group": 2}, {"images": 1}):
                inputs = meta_inputs(head_dim, dtype, pooled, **options)
                out, lse = forward.forward(inputs)
                needed = [True] * len(Gradients._fields)
                backward.backward(inputs.q, None, None, out, lse, inputs, needed)

    for keys, variants in keys_and_variants(launch_all).values():
        assert len(keys) == len(variants)
