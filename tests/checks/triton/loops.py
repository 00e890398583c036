"""Finds wasted work in the loops of a kernel's code: repeated products of tiles, and register spills.

If a tile has fewer rows than its warps' instructions, Triton lets groups of warps compute equal products and equal
exponentials. Registers that do not fit are stored and loaded again; outside of loops that costs almost nothing. No
result shows either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# PTX:             @%p1 bra $L__BB0_2;
_PTX_LABEL = re.compile(r"^(\$L__BB\w+):")
_PTX_JUMP = re.compile(r"^(?P<predicate>@!?%p\w+\s+)?bra(?:\.uni)?\s+(?P<to>\$L__BB\w+)")
_PTX_END = re.compile(r"^ret\b")
# Code for AMD:    s_cbranch_scc1 .LBB0_3
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_JUMP = re.compile(r"^s_(?P<predicate>c)?branch\w*\s+(?P<to>\.LBB\w+)")
_AMD_END = re.compile(r"^s_endpgm\b")
# cuobjdump:       /*00e0*/              @!P0 BRA P1, 0x290 ;
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;")
_SASS_JUMP = re.compile(r"^(?:@!?U?P\w+\s+)?(?:BRA|BSSY|CALL|JMP)\b.*?\b0x(?P<to>[0-9a-f]+)$")
_SASS_END = re.compile(r"^(?:EXIT|RET|(?:BRA|JMP)(?:\.\w+)* 0x)")

# Products by one warp, by a group of four warps, by a whole program; on AMD by one wavefront.
_MMA = re.compile(r"\bmma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.")
_WGMMA = re.compile(r"\bwgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.")
_TCGEN05 = re.compile(r"\btcgen05\.mma\.\S*kind::(\w+) \[[^\]]+\], [^,]+, [^,]+, (%r\d+),")
_TCGEN05_K = {"f16": 16, "tf32": 8}
_AMD_PRODUCT = re.compile(r"\bv_(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)_")
_CONSTANT = re.compile(r"\bmov\.b32\s+(%r\d+), (\d+);")

_SASS_PRODUCT, _SASS_SPILL = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"), re.compile(r"\b(?:LDL|STL)\b")
_AMD_SPILL = re.compile(r"\bscratch_(?:load|store)_")


@dataclass
class _Code:
    """The instructions of a kernel. For some of them, the number of another that may follow, or that none follows."""

    instructions: list[str]
    jumps: dict[int, int]
    ends: set[int]

    def loops(self) -> Iterator[str]:
        """The instructions of every loop: instructions that can reach each other."""
        # gpu-check imports this module without scipy, and analyses no code
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        count = len(self.instructions)
        edges = [(n, n + 1) for n in range(count - 1) if n not in self.ends] + list(self.jumps.items())
        first, second = np.array(edges, dtype=np.int64).reshape(-1, 2).T
        graph = coo_array((np.ones(len(edges), np.int8), (first, second)), shape=(count, count)).tocsr()
        _, component = connected_components(graph, directed=True, connection="strong")
        for number in np.flatnonzero(np.bincount(component) > 1):
            yield "\n".join(self.instructions[n] for n in np.flatnonzero(component == number))


def _code(assembly: str, label: re.Pattern[str], jump: re.Pattern[str], end: re.Pattern[str]) -> _Code:
    """The code of assembly whose lines are labels and instructions."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if found := label.match(line.strip()):
            labels[found[1]] = len(instructions)
        else:
            instructions.append(line.strip())
    jumps, ends = {}, set()
    for number, text in enumerate(instructions):
        if found := jump.match(text):
            jumps[number] = labels[found["to"]]
        if end.match(text) or (found and not found["predicate"]):
            ends.add(number)
    return _Code(instructions, jumps, ends)


def sass_code(sass: str) -> _Code:
    found = _SASS.findall(sass)
    number_of = {int(address, 16): number for number, (address, _) in enumerate(found)}
    instructions = [text for _, text in found]
    jumps = {n: number_of[int(to["to"], 16)] for n, text in enumerate(instructions) if (to := _SASS_JUMP.match(text))}
    return _Code(instructions, jumps, {n for n, text in enumerate(instructions) if _SASS_END.match(text)})


class Spills(NamedTuple):
    """Spill instructions inside loops."""

    text: int  # in loops with products of tiles, over keys or queries
    images: int  # in other loops


def spills_in_sass(sass: str) -> Spills:
    """The code of one kernel in the output of `cuobjdump -sass`."""
    return _spills(sass_code(sass), _SASS_PRODUCT, _SASS_SPILL)


def spills_of_amd(assembly: str) -> Spills:
    return _spills(_code(assembly, _AMD_LABEL, _AMD_JUMP, _AMD_END), _AMD_PRODUCT, _AMD_SPILL)


def _spills(code: _Code, product: re.Pattern[str], spill: re.Pattern[str]) -> Spills:
    text = images = 0
    for loop in code.loops():
        if product.search(loop):
            text += len(spill.findall(loop))
        else:
            images += len(spill.findall(loop))
    return Spills(text, images)


def products_in_ptx(ptx: str, warps: int) -> int:
    """Multiply-adds that a program issues on tensor cores per step of a loop; the largest of all loops."""
    constants = dict(_CONSTANT.findall(ptx))
    most = 0
    for loop in _code(ptx, _PTX_LABEL, _PTX_JUMP, _PTX_END).loops():
        issued = _volume(_MMA, loop) * warps + _volume(_WGMMA, loop) * (warps // 4)
        for kind, descriptor in _TCGEN05.findall(loop):
            # the instruction descriptor has N / 8 in bits 17-22 and M / 16 in bits 24-28 (PTX ISA, tcgen05)
            bits = int(constants[descriptor])
            issued += (bits >> 24 & 31) * 16 * (bits >> 17 & 63) * 8 * _TCGEN05_K[kind]
        most = max(most, issued)
    return most


def products_of_amd(assembly: str, warps: int) -> int:
    """Multiply-adds per step of a loop on AMD's matrix cores."""
    loops = _code(assembly, _AMD_LABEL, _AMD_JUMP, _AMD_END).loops()
    return max((_volume(_AMD_PRODUCT, loop) * warps for loop in loops), default=0)


def _volume(instruction: re.Pattern[str], loop: str) -> int:
    return sum(int(m) * int(n) * int(k) for m, n, k in instruction.findall(loop))
