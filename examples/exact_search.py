"""Exact top-K search over an index on disk. The index is in two halves, as two machines would store them.

python examples/exact_search.py index-folder   # 100 MB; a few seconds
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from valm_kernels import FlatIPIndex, merge_topk

ROWS, DIM, QUERIES, K = 100_000, 256, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the index; created if missing")
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(arguments.rows, DIM, generator=generator)
    queries = torch.randn(QUERIES, DIM, generator=generator)
    half = len(rows) // 2
    for name, part in (("first", rows[:half]), ("second", rows[half:])):
        if not (arguments.folder / name).exists():
            FlatIPIndex(part, dtype="float16").save(arguments.folder / name)

    halves = [FlatIPIndex.load(arguments.folder / name, mmap=True) for name in ("first", "second")]
    if [len(index) for index in halves] != [half, len(rows) - half]:
        stored = sum(map(len, halves))
        parser.error(f"the index in {arguments.folder} has {stored} rows, not {len(rows)}: choose another folder")
    start = time.perf_counter()
    found = merge_topk([index.search(queries, K) for index in halves], [0, half], K)
    print(f"{QUERIES} queries of {len(rows):,} rows: {1000 * (time.perf_counter() - start):.0f} ms")

    stored = rows.half().double()  # the search is exact over the rows as stored, in 16 bits
    expected = (queries.double() @ stored.T).topk(K)
    print(f"the rows of a search in float64: {torch.equal(found.indices, expected.indices)}")
    print(f"largest difference of a score: {(found.scores - expected.values).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
