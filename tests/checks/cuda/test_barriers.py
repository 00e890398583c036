"""The simulator sees races: without any one barrier or wait of the kernels some schedule gives a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.csrc.topk.cuda.simulator import ORDERS, SOURCES, build, copy_sources
from tests.valm_kernels.topk.databases import normals
from valm_kernels.topk import cuda, reference

BARRIERS = (
    "__syncthreads();",
    "sync_warp();",
    "commit_copies();",
    "wait_copies(s.plan.stages - 1);",
    "wait_copies(0);",
)


def sites() -> list[tuple[str, int]]:
    """File and line of each barrier."""
    return [
        (file.name, number)
        for file in sorted((SOURCES / "topk" / "cuda").glob("*.cuh"))
        if file.name != "device.cuh"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.strip() in BARRIERS
    ]


def nearly_equal_rows() -> torch.Tensor:
    """More than a merge keeps at first, in an order that their bounds do not show."""
    rows = normals(4096, 16, seed=1)
    group = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:100]
    rows[group] = 3 * normals(1, 16, seed=2) + 1e-6 * normals(100, 16, seed=3)
    return rows


def answers_are_right(simulate, library: Path, order: str) -> bool:
    """Whether searches with full pools, several parts, several exact scans and a second merge give the reference's
    answers, and the exact scans are those of the queries that need one.
    """
    ordinary = (normals(18, 72), normals(1500, 72, seed=1).half(), 40, 0, 1)
    duplicates = (normals(9, 16), normals(1400, 16, seed=1)[torch.arange(1400) % 3], 40, 9, 1)
    merged_twice = (normals(1, 16, seed=2) + 0.1 * normals(8, 16), nearly_equal_rows(), 8, 0, 8)
    for queries, rows, k, redone, multiprocessors in (ordinary, duplicates, merged_twice):
        simulator = simulate(library, order, multiprocessors=multiprocessors)
        scores, indices = cuda.search(queries, rows, None, None, k)
        expected_scores, expected_indices = reference.ip_topk(queries, rows, None, k)
        same = torch.equal(scores, expected_scores) and torch.equal(indices, expected_indices)
        if not same or simulator.redone != redone:
            return False
    return True


def right_in_every_order(simulate, library: Path) -> bool:
    for order in ORDERS:
        try:
            if not answers_are_right(simulate, library, order):
                return False
        except RuntimeError:  # a deadlock, or no end
            return False
    return True


def test_nothing_taken_away(simulate, library):
    assert right_in_every_order(simulate, library)
    assert len(sites()) >= 10


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize(("file", "line"), sites())
def test_a_missing_barrier_is_seen(simulate, library, tmp_path, file, line):
    source = copy_sources(tmp_path) / "topk" / "cuda" / file
    lines = source.read_text().splitlines()
    assert lines[line - 1].strip() in BARRIERS
    lines[line - 1] = ""
    source.write_text("\n".join(lines))
    assert not right_in_every_order(simulate, build(tmp_path / "mutant.so", tmp_path))
