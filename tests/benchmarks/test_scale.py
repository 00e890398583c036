import sys

import pytest

from benchmarks.valm.scale import Run, run, stages

WRITES = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'part').touch(); time.sleep(0.5); print('done')"


@pytest.mark.slow
def test_a_command_is_watched_to_its_end(tmp_path):
    done = run([sys.executable, "-c", WRITES, tmp_path], tmp_path)
    assert done.output == "done\n" and done.peak_mb > 1
    assert 0 < done.seen["part"] <= done.seconds


def test_a_command_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="ended with 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])


def test_stages_are_the_times_between_their_files():
    seen = {
        "index.faiss.0.tmp": 1.0,
        "index-1.partial.0.tmp": 9.5,
        "index-1.partial": 9.7,
        "index-1.partial.1.tmp": 11.0,
        "index-1.partial.2.tmp": 14.0,
        "index.faiss.1.tmp": 20.0,
    }
    assert stages(Run(seconds=21.0, seen=seen)) == {
        "seconds, queries": 1.0,
        "seconds, trained": 8.5,
        "seconds, vectors added": 4.5,
        "seconds, exact answers, tuned and written": 7.0,
    }
