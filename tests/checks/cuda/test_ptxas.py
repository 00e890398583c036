"""No kernel spills registers, rows come through shared memory, and the committed figures are those of the sources."""

from __future__ import annotations

import shutil

import pytest

from tests.checks.cuda.ptxas import ARCHITECTURES, measure, nvcc_version, read_table, source_hash

# Kernels of a first pass for the 4 types of rows: in 3 tile heights, and with few or many streamed queries.
STREAMED = 4 * 2
FIRST_PASSES = 4 * 3 + STREAMED


@pytest.mark.slow  # the test below holds the table to the sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_figures(architecture):
    figures = measure(architecture)
    assert len(figures) == FIRST_PASSES + 4 * 4 + 1  # norms, queries, merge and exact scan; the exact merge
    assert [row for row in figures if row.spill_bytes or row.stack_bytes] == []
    version, _, table = read_table()
    assert {key for key in table if key[2] == architecture} == {row[:3] for row in figures}
    if version == nvcc_version():  # another compiler allots registers in another way
        assert [table[row[:3]] for row in figures] == figures


def test_the_table_is_of_these_sources_and_has_no_spills():
    _, sources, table = read_table()
    assert sources == source_hash(), "write it anew: python -m tests.checks.cuda.ptxas"
    assert {architecture for *_, architecture in table} == set(ARCHITECTURES)
    assert all(row.spill_bytes == row.stack_bytes == 0 for row in table.values())


def test_rows_are_copied_ahead_of_their_products():
    """A load to registers in the loop of the products is one that ptxas may put behind the products to hide it: 4 row
    tiles are 4 copies a slab. Only streamed queries are loaded.
    """
    _, _, table = read_table()
    loops = [row for row in table.values() if row.mma]
    assert len(loops) == len(ARCHITECTURES) * FIRST_PASSES
    assert {row.kernel for row in loops} == {"first_pass_kernel"}
    assert all(row.copies == 4 for row in loops)
    streamed = [row for row in loops if row.variant.split()[-1] == "true"]
    assert len(streamed) == len(ARCHITECTURES) * STREAMED
    assert all((row.loads > 0) == (row in streamed) for row in loops)
