"""The instruction set and the threads of the native code, which all of its operations share."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.valm_kernels.test_text_blocks import blocks_of, inputs_of, int8_layer
from valm_kernels import (
    FlatIPIndex,
    int8_rows,
    ip_scores,
    ip_topk,
    merge_topk,
    visual_fusion_attn,
    visual_fusion_attn_varlen,
)
from valm_kernels.native import _module, cpu_isa, native
from valm_kernels.visual_fusion import cpu as attention_cpu

# made before a fork: PyTorch's own operations wait for threads too
ROWS = torch.arange(5000 * 32).reshape(5000, 32).sin()
QKV = torch.arange(3 * 4 * 64 * 16).reshape(3, 1, 4, 64, 16).sin()
IMAGES = torch.arange(4 * 64 * 2 * 16).reshape(1, 4, 64, 2, 16).cos()
PACKED = torch.arange(3 * 4 * 4096 * 16).reshape(3, 1, 4, 4096, 16).sin()
BOUNDS = torch.tensor([0, 1000, 4096])
IDS = torch.arange(100)
NUMBERS = torch.arange(5000)
PRODUCTS = torch.arange(5000 * 32, dtype=torch.int32).reshape(5000, 32)
LONG_ROWS = ROWS.reshape(32, 5000)
WEIGHT = (127 * ROWS).to(torch.int8).reshape(32, 5000)
BLOCKS = blocks_of(int8_layer, heads=8, head_dim=64, inner=512)
HIDDEN, PAST = inputs_of(BLOCKS, rows=32, texts=16, past=40)


def attend() -> torch.Tensor:
    return visual_fusion_attn(*QKV, IMAGES, IMAGES)


def scale_int8() -> torch.Tensor:
    # copied by NumPy, as PyTorch's own copy of so many numbers waits for threads
    products = torch.from_numpy(PRODUCTS.numpy().copy())
    factors = (ROWS[:, 0].contiguous(), ROWS[:, 1].contiguous(), *ROWS[:3])
    return int8_rows.scale_products_(products, *factors)[:100]


def step_blocks() -> torch.Tensor:
    return BLOCKS.step(HIDDEN.clone(), [2] * 16, PAST)[0][:9]


def search_an_index() -> torch.Tensor:
    """Also its changes, and the merge of two results; large enough for PyTorch to use threads."""
    index = FlatIPIndex(ROWS, ids=NUMBERS)
    found = index.search(ROWS[:600], 100)
    index.add(ROWS, ids=NUMBERS + len(ROWS))
    index.remove(NUMBERS[:9])
    index.dequantised()
    return merge_topk([found, found], [0, 1], 200).scores[:9]


def attend_packed() -> torch.Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in PACKED)
    return visual_fusion_attn_varlen(q, k, v, None, None, BOUNDS)[:9]


OPERATIONS = {
    "FlatIPIndex": search_an_index,
    "ip_topk": lambda: ip_topk(ROWS[17], ROWS, 3).scores,
    "ip_scores": lambda: ip_scores(ROWS[:100], ROWS, IDS, IDS),
    "visual_fusion_attn": attend,
    "image weights": lambda: visual_fusion_attn(*QKV, IMAGES, IMAGES, return_image_weights=True)[1],
    "round_rows": lambda: int8_rows.round_rows(ROWS)[0][:100],
    "scale_products_": scale_int8,
    "TextBlocks.step": step_blocks,
    "linear_rows": lambda: int8_rows.linear_rows(LONG_ROWS[:5], WEIGHT, *ROWS[:3]),
}
# Of the operations in a forked child: what PyTorch does alone, or beside native code.
FORKED = OPERATIONS | {
    "matmul": lambda: ip_topk(ROWS[:600], ROWS, 3, impl="matmul").scores[:9],
    "visual_fusion_attn_varlen": attend_packed,
}
NATIVE = (
    "ip_topk_cpu",
    "ip_scores_cpu",
    "image_attn_forward",
    "round_rows",
    "scale_products",
    "linear_rows",
    "text_blocks_step",
)


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Callable[[], torch.Tensor]:
    return OPERATIONS[request.param]


@pytest.mark.parametrize("isa", native().cpu_isas())
def test_the_environment_moves_every_operation(monkeypatch, operation, isa):
    """The native functions get the name that VALM_KERNELS_ISA holds."""
    seen = []

    def watched(function: Callable) -> Callable:
        def call(*arguments):
            seen.extend(a for a in arguments if a in native().cpu_isas())
            return function(*arguments)

        return call

    for name in NATIVE:
        monkeypatch.setattr(native(), name, watched(getattr(native(), name)))
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    operation()
    assert seen == [isa]


@pytest.mark.parametrize("asked", ["avx1024", ""])
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch, operation, asked):
    monkeypatch.setenv("VALM_KERNELS_ISA", asked)
    with pytest.raises(ValueError, match=rf"VALM_KERNELS_ISA is '{asked}', this machine runs .*generic"):
        operation()


def test_native_code_names_what_is_allowed():
    others = {"amxint8", "avx512vnni", "avx512", "avx2", "avx1024"} - set(native().cpu_isas())
    for name in others:
        with pytest.raises(ValueError, match=rf"one that this processor runs \(.*generic, tiles\), got {name}"):
            native().image_attn_isa(name)


def test_the_best_instruction_set_is_the_default(monkeypatch):
    monkeypatch.delenv("VALM_KERNELS_ISA", raising=False)
    assert cpu_isa() == native().cpu_isas()[0]


def test_an_operation_runs_on_the_best_that_was_compiled_for_it():
    instead = {"amxint8": "avx512", "avx512vnni": "avx512", "tiles": "generic"}
    for isa in native().cpu_isas():
        assert native().image_attn_isa(isa) == instead.get(isa, isa)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="/proc/cpuinfo of x86-64"
)
def test_every_instruction_set_of_the_processor_is_used():
    """AMX apart, which Linux has to grant."""
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needed = {"avx512vnni": {"avx512_vnni"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    needed |= {"avx2": {"avx2", "fma", "f16c"}, "generic": set(), "tiles": set()}
    names = list(needed)
    below = {name: names[place:] for place, name in enumerate(names)}  # each includes those behind it
    expected = [name for name in names if set().union(*(needed[other] for other in below[name])) <= flags]
    assert [name for name in native().cpu_isas() if name != "amxint8"] == expected


def test_a_tensor_that_the_native_code_does_not_know_is_refused(monkeypatch):
    """A module older than the Python code must not compute without a new argument."""
    out = visual_fusion_attn(QKV[0].clone().requires_grad_(), *QKV[1:], IMAGES, IMAGES)
    run = attention_cpu._ImageBranch.run

    def with_novel(self: attention_cpu._ImageBranch, direction: str, **tensors: torch.Tensor | None) -> None:
        run(self, direction, novel=IDS, **tensors)

    monkeypatch.setattr(attention_cpu._ImageBranch, "run", with_novel)
    for call in (attend, out.sum().backward):
        with pytest.raises(ValueError, match=r"unknown tensor 'novel'.* differ in version"):
            call()


@pytest.mark.parametrize("version", [{}, {"interface_version": 1}])
def test_a_module_of_another_version_is_refused(monkeypatch, version):
    stale = SimpleNamespace(__file__="old.so", **version)
    monkeypatch.setattr("valm_kernels.native.import_module", lambda name: stale)
    _module.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"old\.so has interface version .*, expected \d+\. Build it again with"):
            attend()
    finally:
        _module.cache_clear()


@pytest.mark.slow  # it starts processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", FORKED)
def test_a_forked_child_computes_on_one_thread(name):
    """With the parent's two threads it would wait forever; its own thread count comes back after the call."""
    code = (
        "import os, torch\n"
        f"from {__name__} import FORKED\n"
        f"operation = FORKED[{name!r}]\n"
        "torch.set_num_threads(2)\n"
        "expected = operation()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = operation().equal(expected)\n"
        "    os._exit(0 if same and torch.get_num_threads() == 2 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.communicate(timeout=60)[0].strip() == "0"
    finally:
        if process.poll() is None:  # the child waits: end both
            os.killpg(process.pid, 9)
