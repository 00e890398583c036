"""Random cases of visual_fusion_attn with all its options, and of the exact search, against float64.

    python -m tests.valm_kernels.attack [--attention 10000] [--searches 2000] [--first 0] [--impl cpu]

A case depends only on its number: `--attention 1 --searches 0 --first N` repeats case N. The command prints what it ran
and the errors, and exits with 1 if a result was wrong. tests/README.md contains the counts of a whole run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable

import torch

from tests.valm_kernels.topk.random_searches import check_search
from tests.valm_kernels.visual_fusion.random_cases import ALLOWED, Error, attention_errors

# Multiples of eager's error above which a case is counted.
COUNTED = (2, 4, 10)


def run(what: str, numbers: range, case: Callable[[int], None]) -> int:
    """Runs cases by their numbers, prints the wrong ones, and returns their number."""
    wrong = 0
    for number in numbers:
        try:
            case(number)
        except Exception as error:
            wrong += 1
            print(f"{what} {number}: {type(error).__name__}: {error}", flush=True)
        if (number + 1) % 1000 == 0:
            print(f"{what} {number + 1}", file=sys.stderr, flush=True)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=int, default=10_000, help="cases of visual_fusion_attn")
    parser.add_argument("--searches", type=int, default=2_000, help="cases of the search")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of both")
    parser.add_argument("--impl", default="cpu", help="of visual_fusion_attn; triton needs TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)

    errors: dict[tuple[str, str], list[tuple[Error, int]]] = defaultdict(list)
    dtypes: Counter[str] = Counter()
    searches: Counter[str] = Counter()

    def attention(number: int) -> None:
        dtype, found = attention_errors(number, options.impl)
        dtypes[dtype] += 1
        kind = "float32" if dtype == "float32" else "16 bits"
        for name, error in found.items():
            errors[kind, name].append((error, number))

    numbers = range(options.first, options.first + options.attention)
    wrong_attention = run("attention", numbers, attention)
    numbers = range(options.first, options.first + options.searches)
    wrong_searches = run("search", numbers, lambda number: searches.update(check_search(number)))
    by_dtype = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(dtypes.items()))
    print(f"visual_fusion_attn, {options.impl}: {by_dtype}; {wrong_attention} wrong")
    columns = ["cases", *(f"over {n} × eager" for n in COUNTED), "largest share of the bound", "its number"]
    print(f"\n| | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for (dtype, name), found in sorted(errors.items()):
        counts = " | ".join(f"{sum(error.of_eager > n for error, _ in found):,}" for n in COUNTED)
        largest, number = max((error.of_bound / ALLOWED, number) for error, number in found)
        print(f"| {dtype}: {name} | {len(found):,} | {counts} | {largest:.2f} | {number} |")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(searches.items()))
    print(f"\nsearches: {options.searches:,} ({kinds}); {wrong_searches} wrong")
    return int(wrong_attention + wrong_searches > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
