import sys

import pytest

from benchmarks.valm.scale import Results, Run, run, stages, table

# Writes one file after the other, and goes on behind those that are there.
RESUMED = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1]) / "index-1.partial"
folder.mkdir(exist_ok=True)
for number in range(6):
    if not (folder / f"part-{number}").exists():
        time.sleep(0.3)
        (folder / f"part-{number}").touch()
print("done")
"""


@pytest.mark.slow
def test_a_command_is_killed_at_a_file_and_given_again(tmp_path):
    done = run([sys.executable, "-c", RESUMED, tmp_path], tmp_path, killed_at=["part-1", "part-3"])
    assert (done.kills, done.output) == (2, "done\n")
    assert done.peak_mb > 1
    assert {f"part-{number}" for number in range(5)} <= done.seen.keys()
    assert 0 < done.seen["part-0"] < done.seen["part-4"] <= done.seconds


def test_a_command_that_fails_or_ends_before_it_is_killed_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="to be killed at"):
        run([sys.executable, "-c", "pass"], tmp_path, killed_at=["part-*"])


def test_stages_are_the_times_between_their_files():
    seen = {
        "index-1.partial": 1.0,
        "added-0.faiss": 9.5,
        "added-500.faiss": 11.0,
        "added-1000.faiss": 14.0,
        "index.faiss.0.tmp": 20.0,
    }
    found = stages(Run(seconds=21.0, seen=seen))
    assert found == {
        "seconds, queries": 1.0,
        "seconds, trained": 8.5,
        "seconds, vectors added": 4.5,
        "seconds, exact answers": 6.0,
        "seconds, written and tuned": 1.0,
    }


def test_the_table_has_a_column_for_each_size(tmp_path):
    file = tmp_path / "scale.csv"
    Results(file, 2000).add("build", seconds=2.0, kills=0)
    Results(file, 1000).add("build", seconds=1.0)
    assert table(file).splitlines() == [
        "| | 1,000 | 2,000 |",
        "| --- | --- | --- |",
        "| build: seconds | 1 | 2 |",
        "| build: kills |  | 0 |",
    ]
