"""Finds in a kernel's PTX how it moves data: the width of each access to global memory, and what each loop does.

Registers and spills do not show loads that fell apart into single elements, or loads for which a loop waits. Both cost
more than a spill, and no result shows them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LABEL = re.compile(r"^(\$L\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+);")
# ld.global.L1::evict_last.v4.b32: four elements of 32 bits
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)* \[[^\]]+\], \[[^\]]+\], (\w+)")
_WAIT = re.compile(r"\bcp\.async\.wait_group\s+(\w+);")
_PRODUCT = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")

# Iterations that a copy may be ahead of its use.
MAX_STAGES = 8


@dataclass(frozen=True)
class Code:
    """Counts of a stretch of PTX; bytes are per thread and instruction."""

    loads: Counter[int]  # loads from global memory into registers, by bytes
    stores: Counter[int]
    async_copies: Counter[int]  # asynchronous copies from global to shared memory, by bytes
    products: int  # tensor-core instructions
    instructions: int
    # least number of instructions from a copy to its wait in the loop; None without asynchronous copies
    copy_distance: int | None = None


def whole(ptx: str) -> Code:
    """The kernel as a whole."""
    return _code(ptx.splitlines())


def loops(ptx: str) -> list[Code]:
    """The innermost loops, in the order of the text."""
    lines = ptx.splitlines()
    labels: dict[str, int] = {}
    spans = []
    for number, line in enumerate(lines):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            spans.append((labels[branch[1]], number))
    innermost = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [_code(lines[first : last + 1], repeats=True) for first, last in innermost]


def _code(lines: list[str], repeats: bool = False) -> Code:
    counts: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter(), "cp": Counter()}
    products = 0
    issues, waits = [], []  # instruction numbers; each wait with the number of groups that may stay in flight
    instructions = [text for line in lines if (text := line.strip()).endswith(";") and not text.startswith(".")]
    for number, text in enumerate(instructions):
        if access := _ACCESS.search(text):
            counts[access[1]][int(access[2] or 1) * int(access[3]) // 8] += 1
        elif copy := _ASYNC_COPY.search(text):
            counts["cp"][int(copy[1], 0)] += 1
        elif wait := _WAIT.search(text):
            waits.append((number, int(wait[1], 0)))
        elif "cp.async.commit_group" in text:
            issues.append(number)
        products += bool(_PRODUCT.search(text))
    distance = _copy_distance(issues, waits, len(instructions)) if repeats else None
    return Code(counts["ld"], counts["st"], counts["cp"], products, len(instructions), distance)


def _copy_distance(issues: list[int], waits: list[tuple[int, int]], length: int) -> int | None:
    """Instructions between a commit and the first wait that covers it, in a loop of `length` instructions."""
    if not issues or not waits:
        return None
    distances = []
    allowed = dict(waits)
    for issue in issues:
        # iteration by iteration: a wait covers the copy if enough groups were committed after it
        later = 0
        for number in range(issue + 1, issue + 1 + MAX_STAGES * length):
            later += number % length in issues
            if later >= allowed.get(number % length, later + 1):
                distances.append(number - issue)
                break
    return min(distances, default=None)
