import io
import subprocess
import sys

import pytest

from valm import progress
from valm.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_lines_without_carriage_returns(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    assert list(progress_bar(range(5), desc="encode", unit=" images")) == list(range(5))
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    assert len(lines) >= 2 and all(line.startswith("encode:") for line in lines)
    assert "5/5" in lines[-1]


def test_a_log_is_quiet_between_its_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with progress_bar(total=1000, desc="encode") as bar:
        for _ in range(1000):
            bar.update()
    assert len(log.getvalue().splitlines()) == 2  # at the beginning and at the end


@pytest.mark.parametrize(
    ("total", "shown"),
    [(5, "5/5"), (29, "29/29"), (2200, "2200/2200"), (99_999, "99999/99999"), (123_456, "123k/123k")],
)
def test_small_counts_are_whole_numbers(monkeypatch, total, shown):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with progress_bar(desc="encode", unit=" images", unit_scale=True) as bar:
        bar.total = total
        bar.update(total)
    assert f"| {shown} [" in log.getvalue().splitlines()[-1]


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    list(progress_bar(range(3), desc="encode"))
    assert "\rencode" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_no_bar_where_none_is_wanted(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", stream := Terminal() if terminal else io.StringIO())
    list(progress_bar(range(3), shown=False))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    list(progress_bar(range(3)))
    assert stream.getvalue() == ""


def test_a_command_in_a_pipe_writes_no_carriage_return(tmp_path):
    """The whole way: a command whose bar is written by the library."""
    code = """
from valm.store.shards import ProgressBar
with ProgressBar('a', ' b', 1, True) as bar:
    bar.begin(2)
    bar.advance(2, skipped=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr and "2/2" in done.stderr and "skipped=1" in done.stderr
