"""What the benchmarks share, on a benchmark of its own."""

import csv

import pytest
import torch

from benchmarks import conftest
from benchmarks.outcomes import append_row

pytest_plugins = "pytester"
BENCHMARK = """
import pytest
import torch

@pytest.mark.parametrize("name", ["ours", "peer"])
def bench_sum(measure, name):
    def function(x):
        return x + 1

    def check(found):
        assert (found == 1).all()

    inputs = (torch.zeros(3),)
    measure(group="sum", name=name, function=function, inputs=inputs, check=check, rounds=4, arithmetic=1e-6, note="n")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs BENCHMARK on a stand-in for a GPU; returns the rows."""
    pytester.makeconftest("from benchmarks.conftest import *")
    pytester.makepyfile(bench_sum=BENCHMARK)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in one, pytest-benchmark times nothing
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(conftest, "cuda_peak_mb", lambda function: 1.5)

    def run(gpu_ms, *options):
        monkeypatch.setattr(conftest, "gpu_ms", gpu_ms)
        names = ("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*")
        arguments = ("--device", "cuda", "--results", "rows.csv", *names)
        assert pytester.runpytest_inprocess(*arguments, *options).ret == 0
        with (pytester.path / "rows.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


@pytest.mark.parametrize("options", [["--benchmark-only"], ["-p", "no:benchmark"]], ids=["", "plain loop"])
def test_each_row_has_the_time_of_the_call_and_of_the_gpu(run, options):
    rows = run(lambda function, inputs, device: 0.125 * len(inputs), *options)
    found = [(row["name"], row["gpu_ms"], row["rounds"], row["note"]) for row in rows]
    assert found == [("ours", "0.125", "4", "n"), ("peer", "0.125", "4", "n")]
    assert all(float(row["min_ms"]) <= float(row["median_ms"]) for row in rows)
    assert (rows[0]["peak_mb"], rows[0]["arithmetic_ms"]) == ("1.5", "0.001")


def test_a_call_that_no_graph_can_hold_has_no_gpu_time(run):
    def gpu_ms(function, inputs, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    rows = run(gpu_ms)
    assert [row["gpu_ms"] for row in rows] == ["", ""]
    assert rows[0]["note"] == "n; no GPU time: operation not permitted when stream is capturing"


def test_rows_are_added_to_the_file(run):
    def gpu_ms(function, inputs, device):
        return 1.0

    assert [row["name"] for row in run(gpu_ms, "-k", "ours")] == ["ours"]
    assert [row["name"] for row in run(gpu_ms, "-k", "peer")] == ["ours", "peer"]


def test_a_file_of_other_columns_is_refused(tmp_path):
    """The results of an earlier version, say: their columns would not be those of the new row."""
    path = tmp_path / "rows.csv"
    path.write_text("group,name,median_ms\nsum,ours,1\n")
    with pytest.raises(ValueError, match=r"rows.csv has other columns \(group, name, median_ms\): name another file"):
        append_row(path, {"group": "sum", "name": "peer"})
    assert path.read_text() == "group,name,median_ms\nsum,ours,1\n"
