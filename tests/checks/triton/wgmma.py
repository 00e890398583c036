"""Finds, in machine code for compute capability 9.0, registers of a product in flight that another instruction uses.

A wgmma (HGMMA in machine code) is asynchronous. The registers of its left operand and of its sums belong to it until
a wait (WARPGROUP.DEPBAR) covers its group. ptxas before 13.3 sometimes gives registers of the left operand to another
instruction earlier (https://github.com/triton-lang/triton/pull/11781): the product is then wrong on a GPU, and right
in Triton's interpreter. `check` follows each product along every path of the control flow to the wait that covers it.

It does not see shared memory that is overwritten too early. Compute capability 10.0 has no such registers: the operands
of tcgen05.mma are in shared memory and tensor memory, and its waits depend on numbers in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.checks.triton.loops import sass_code

_PRODUCT = re.compile(r"[HIQ]GMMA\.64x(\d+)x\d+\.(F32|F16|S32)\S*")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_PREDICATE = re.compile(r"!?U?P(?:\d|T|R)$")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
# Their first operand that is no predicate is read.
_ONLY_PREDICATES = re.compile(r"(?:[A-Z]SETP|HSETP2|R2P|FCHK|WARPSYNC|RET|CALL|BAR|BMOV|YIELD)\b")
# They move several registers, though their name has no size.
_PAIRS = re.compile(r"CS2R(?!\.32)|D(?:ADD|MUL|FMA)\b|\w+\.WIDE\b|(?:F2F|I2F)\.F64|IMAD\.WIDE")
LEFT_REGISTERS = 4  # of 64 rows by 32 bytes, in each of 128 threads


@dataclass(frozen=True)
class Use:
    """The registers that an instruction writes and reads; of a product, its left operand and its sums."""

    text: str
    writes: frozenset[int]
    reads: frozenset[int]
    left: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()
    commits: bool = False  # the group of products up to this one
    wait: int | None = None  # how many groups may stay in flight


@dataclass(frozen=True)
class Found:
    products: int
    from_registers: int  # products whose left operand is in registers
    reused: list[str]  # the product and the instruction that uses its registers too early


def check(sass: str) -> Found:
    """Checks the code of one kernel in the output of `cuobjdump -sass`.

    Raises:
        ValueError: the code has a product that this module cannot read, or a jump to a computed address.
    """
    code = sass_code(sass)
    if any(re.search(r"\b(?:BRX|JMX)\b", text) for text in code.instructions):
        raise ValueError("a jump to a computed address")
    uses = [use_of(text) for text in code.instructions]
    products = [number for number, use in enumerate(uses) if use.sums]
    if len(products) != sass.count("GMMA."):
        raise ValueError(f"{sass.count('GMMA.')} products, of which {len(products)} can be read")
    following = [
        [*([code.jumps[number]] if number in code.jumps else []), *([] if number in code.ends else [number + 1])]
        for number in range(len(uses))
    ]
    most = max((use.wait for use in uses if use.wait is not None), default=0)
    reused = []
    for number in products:
        for other in _used_in_flight(number, uses, following, most):
            reused.append(f"{uses[number].text} <- {uses[other].text}")
    return Found(len(products), sum(bool(uses[number].left) for number in products), reused)


def _used_in_flight(number: int, uses: list[Use], following: list[list[int]], most: int) -> list[int]:
    """Instructions that use registers of product `number` before a wait covers it."""
    product, found = uses[number], set()
    # with the groups committed after the product's own; -1: its own is not
    todo = [(after, 0 if product.commits else -1) for after in following[number]]
    seen = set(todo)
    while todo:
        here, later = todo.pop()
        if here >= len(uses):
            continue
        use = uses[here]
        if use.wait is not None and later >= use.wait:
            continue
        adds_to_it = use.sums == product.sums
        if use.writes & product.left or (not adds_to_it and (use.writes | use.reads) & product.sums):
            found.add(here)
        # more groups than any wait allows make no difference
        later = min(later + use.commits, most)
        for state in ((after, later) for after in following[here]):
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return sorted(found)


def use_of(text: str) -> Use:
    """The registers of an instruction."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    name, _, rest = text.partition(" ")
    operands = [operand.strip() for operand in re.split(r",(?![^\[]*\])", rest)]
    if product := _PRODUCT.match(text):
        return _product_of(text, product, operands)
    if wait := _WAIT.match(text):
        return Use(text, frozenset(), frozenset(), wait=int(wait[1], 16))
    size = 4 if ".128" in name else 2 if ".64" in name or _PAIRS.match(name) else 1
    if name.startswith(("LDSM", "STSM")):
        size = int(name.rsplit(".", 1)[-1]) if name[-1] in "124" else 1
    elif name.startswith(("HMMA", "IMMA")):
        size = 4
    written: set[int] = set()
    read: set[int] = set()
    values = [operand for operand in operands if not _PREDICATE.match(operand)]
    for position, operand in enumerate(values):
        is_result = position == 0 and not _ONLY_PREDICATES.match(name) and operand.startswith("R")
        for register in _REGISTER.finditer(operand):
            first, in_memory = int(register[1]), "[" in operand
            is_factor = name.startswith("IMAD.WIDE") and position in (1, 2)  # of 32 bits
            count = (2 if register[2] else 1) if in_memory or is_factor else max(size, 2 if register[2] else 1)
            (written if is_result else read).update(range(first, first + count))
    return Use(text, frozenset(written), frozenset(read))


def _product_of(text: str, product: re.Match[str], operands: list[str]) -> Use:
    """The sums of 64 rows by N columns lie in 128 threads."""
    registers = int(product[1]) // (4 if product[2] == "F16" else 2)
    first = int(operands[0][1:])
    sums = frozenset(range(first, first + registers))
    left: frozenset[int] = frozenset()
    if operand := re.match(r"R(\d+)", operands[1]):
        left = frozenset(range(int(operand[1]), int(operand[1]) + LEFT_REGISTERS))
    adds = operands[3 if left else 2] != "RZ" if len(operands) > 2 else False
    return Use(text, sums, left | (sums if adds else frozenset()), left, sums, commits="gsb0" in operands)
