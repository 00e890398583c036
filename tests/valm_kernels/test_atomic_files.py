"""A file or folder is whole or not there, whoever is killed; leftovers are told from what is being written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from valm_kernels import atomic_files
from valm_kernels.atomic_files import (
    ABANDONED_SECONDS,
    atomic_path,
    claimed,
    folder_lock,
    is_temporary,
    remove_leftovers,
    temporary_file,
    temporary_name,
)

# Writes half of a file, or of a file in a folder, says so, and waits to be killed.
HALF_WRITTEN = """
import sys, time
from pathlib import Path
from valm_kernels.atomic_files import atomic_path, claimed
path = Path(sys.argv[1])
with claimed(path, Path.mkdir) if sys.argv[2] == "folder" else atomic_path(path) as temporary:
    (temporary / "file" if sys.argv[2] == "folder" else temporary).write_text("half")
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_path_holds_only_what_was_written_whole(tmp_path):
    target = tmp_path / "data.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"first")
        assert is_temporary(temporary.name) and not target.exists()
    assert target.read_bytes() == b"first"
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("stopped")
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["data.bin"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("76800 requested and 28608 written")]
)
def test_a_full_disk_names_the_file(tmp_path, error):
    """Neither write() nor numpy does."""
    with pytest.raises(OSError, match=r"No space|28608 written") as raised, atomic_path(tmp_path / "data.bin"):
        raise error
    assert raised.value.filename == str(tmp_path / "data.bin") and raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "data.bin"
    with atomic_path(target) as first:
        first.write_bytes(b"first")
        with atomic_path(target) as second:
            second.write_bytes(b"second, longer")
        assert target.read_bytes() == b"second, longer"
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_what_the_killed_left_is_removed(tmp_path, kind):
    command = [sys.executable, "-c", HALF_WRITTEN, tmp_path / "data", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        (left,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert left.exists()  # its writer lives
        writer.send_signal(signal.SIGKILL)
    assert left.exists() and is_temporary(left.name)
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writes", [atomic_path, lambda path: claimed(path, Path.mkdir)], ids=["file", "folder"])
def test_what_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch, writes):
    """Another process may take a new temporary file for abandoned until its writer has the lock."""
    locked, raced = atomic_files._locked, []

    def race(path):
        if not raced:
            raced.append(path)
            remove_leftovers(tmp_path)
        return locked(path)

    monkeypatch.setattr(atomic_files, "_locked", race)
    with writes(tmp_path / "data") as temporary:
        assert temporary.exists() and temporary != raced[0] and not raced[0].exists()
        remove_leftovers(tmp_path)
        assert temporary.exists()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == (["data"] if writes is atomic_path else [])


def test_the_lock_of_a_folder_is_waited_for(tmp_path):
    with folder_lock(tmp_path, 0):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="another process is writing there"), folder_lock(tmp_path, 0.2):
            pass
        assert time.monotonic() - start >= 0.2
    with folder_lock(tmp_path, 0):
        pass


def test_other_files_are_never_leftovers(tmp_path):
    names = ["notes.tmp", "data.17.tmp", f"data.{'0' * 31}.tmp", f"data.{'0' * 32}.txt", "data"]
    for name in names:
        (tmp_path / name).touch()
    os.mkfifo(temporary_name(tmp_path / "pipe"))  # no writer of ours makes one; opened, it would wait
    before = sorted(os.listdir(tmp_path))
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "store").mkdir()
    temporary_name(tmp_path / "store" / "data").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path / "store")
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_without_locks_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("valm_kernels.atomic_files.fcntl", None)
    with temporary_file(tmp_path / "data") as young:
        old = temporary_name(tmp_path / "data")
        old.touch()
        os.utime(old, (0, time.time() - ABANDONED_SECONDS - 60))
        remove_leftovers(tmp_path)
        assert young.exists() and not old.exists()
