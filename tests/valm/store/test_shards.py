import json
from unittest.mock import Mock

import numpy as np
import pytest

from tests.valm.store.manifests import check_every_bit_counts, contents, edit_manifest
from valm.errors import ValmError
from valm.store import shards
from valm.store.shards import (
    Manifest,
    ProgressBar,
    ShardedBuild,
    ShardFiles,
    file_entry,
    files_of,
    open_array,
    open_manifest,
    run_here,
)
from valm_kernels.atomic_files import temporary_file, temporary_name

PLAN = {"source": "numbers", "size": 3}


def build(out, plan=PLAN):
    return ShardedBuild(out, "heap", plan)


def write(out, numbers):
    """A work: shard `number` holds `part` numbers."""

    def work(number, part, progress):
        numbers.append(number)
        files = ShardFiles(out, number)
        files.write_array("numbers", np.arange(part))
        files.finish(count=part)

    return work


def run_backwards(work, shards, progress):
    run_here(work, reversed(list(shards)), progress)


def finish(build):
    build.finish({"format": "valm heap", "version": 3})


def test_shards_may_be_written_in_any_order_and_not_twice(tmp_path):
    for name, run in (("one", run_here), ("other", run_backwards)):
        started = build(tmp_path / name)
        started.write(write(started.out, []), [4], run, Mock())
        written = []
        resumed = build(tmp_path / name)
        resumed.write(write(resumed.out, written), [4, 5, 6], run, Mock())
        assert sorted(written) == [1, 2]
        finish(resumed)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    manifest = open_manifest(tmp_path / "one", "heap", 3, "make heap", Manifest)
    assert [shard["count"] for shard in manifest["shards"]] == [4, 5, 6]
    assert manifest["plan"] == PLAN
    names = [f"numbers-0000{number}.npy" for number in range(3)]
    assert list(files_of(manifest)) == [file_entry(tmp_path / "one" / name) for name in names]
    assert sorted(contents(tmp_path / "one")) == ["manifest.json", *names]


def test_killed_between_the_manifest_and_the_end(tmp_path):
    started = build(tmp_path)
    started.write(write(started.out, []), [4, 5], run_here, Mock())
    left = contents(tmp_path)
    finish(started)
    finished = contents(tmp_path)
    for name in ("build.json", "shard-00001.json"):
        (tmp_path / name).write_bytes(left[name])
    again = build(tmp_path)
    with again.writing():
        assert again.finished and len(again.done()) == 2
    assert contents(tmp_path) == finished


@pytest.mark.parametrize("end", [finish, ShardedBuild.abandon])
def test_what_killed_tries_left_is_removed_at_the_end(tmp_path, end):
    started = build(tmp_path)
    started.write(write(started.out, []), [4, 5], run_here, Mock())
    names = ("numbers-00001.npy", "shard-00001.json", "build.json", "manifest.json", "index.faiss")
    for name in names:
        temporary_name(tmp_path / name).touch()
    (tmp_path / "notes.tmp").touch()
    with temporary_file(tmp_path / "index.faiss") as of_a_writer_that_lives:
        end(started)
        there = {of_a_writer_that_lives, tmp_path / "notes.tmp"}
        assert set(tmp_path.glob("*.tmp")) == there
        assert end is finish or set(tmp_path.iterdir()) == there


def test_another_writer_is_refused_and_finds_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0)
    first, second = build(tmp_path), build(tmp_path)
    with first.writing():
        with pytest.raises(TimeoutError, match="another process is writing there"), second.writing():
            pass
        finish(first)
    assert not second.finished
    with second.writing():
        assert second.finished


def test_what_differs_from_the_plan_is_named(tmp_path):
    started = build(tmp_path)
    with pytest.raises(ValmError, match="another unfinished heap: its size is 3, here it is 4; delete it or choose"):
        build(tmp_path, {**PLAN, "size": 4, "colour": "red"})
    finish(started)
    with pytest.raises(ValmError, match=r"holds another heap: its (size|source) is .*; choose another folder"):
        build(tmp_path, {})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValmError, match=r"the manifest .*manifest\.json is damaged: .*got a list of 0"):
        build(tmp_path)


def opened(folder, what="heap", version=3):
    return open_manifest(folder, what, version, f"make {what}", Manifest)


def finished(folder, **change):
    """A folder of one shard, the entry of whose file has a `change`."""
    started = build(folder)
    started.write(write(folder, []), [3], run_here, Mock())
    finish(started)
    (shard,) = json.loads((folder / "manifest.json").read_text())["shards"]
    shard["files"][0] |= change
    edit_manifest(folder, shards=[shard])
    return folder


def test_a_folder_of_another_format_or_version_is_named(tmp_path):
    def fails(message, folder=tmp_path, what="heap", version=3):
        with pytest.raises(ValmError, match=message):
            opened(folder, what, version)

    fails(r"no heap at .*none: there is no such folder", tmp_path / "none")
    fails(r"is not a heap: it has no manifest\.json; make one with `make heap`")
    build(tmp_path)
    fails("is unfinished; run `make heap` again, it resumes where it stopped")
    finished(tmp_path)
    fails("is not the manifest of a pile", what="pile")
    fails("has format version 3, this valm reads 4; make it again", version=4)
    (tmp_path / "numbers-00000.npy").unlink()
    fails(r"numbers-00000\.npy is missing; make it again")


def test_an_array_is_what_the_manifest_says(tmp_path, monkeypatch):
    file = tmp_path / "a.npy"
    np.save(file, np.arange(4, dtype=np.int32))
    assert isinstance(open_array(file, (4,), np.int32), np.memmap)
    for shape, dtype in (((5,), np.int32), ((4,), np.int64)):
        with pytest.raises(ValmError, match=r"a\.npy holds int32 \(4,\), the manifest says"):
            open_array(file, shape, dtype)
    for content in (b"", b"[1, 2]", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((("):
        file.write_bytes(content)
        with pytest.raises(ValmError, match=r"a\.npy is damaged: .*; make it again"):
            open_array(file, (4,), np.int32)
    monkeypatch.setattr(np, "load", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):  # not damaged
        open_array(file, (4,), np.int32)


def test_the_bar_guesses_the_whole_from_the_shards_begun(capsys):
    with ProgressBar("write", " numbers", 4, True) as bar:
        bar.begin(100)
        bar.advance(100, skipped=2)
        bar.begin(300)
        bar.advance(200)
    line = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "300/800" in line and "skipped=2" in line and "numbers/s" in line


@pytest.fixture
def outside(tmp_path):
    """A file that is neither read nor deleted, whatever a manifest or a record says."""
    (tmp_path / "outside").mkdir()
    file = tmp_path / "outside" / "numbers-00000.npy"
    np.save(file, np.arange(3))
    return file


def test_a_manifest_with_one_changed_bit_is_refused(tmp_path):
    """Whatever that bit says."""
    folder = finished(tmp_path / "finished")
    check_every_bit_counts(folder / "manifest.json", lambda: opened(folder), 250)


@pytest.mark.parametrize(
    "name",
    [
        "../outside/numbers-00000.npy",
        "numbers-00000.npy/../../outside/numbers-00000.npy",
        "numbers-x/../../outside/stolen.npy",
        "/etc/passwd",
        "numbers-00000.npy\n",
        "numbers-00001.npy",
    ],
)
def test_names_that_are_not_ours_are_neither_read_nor_deleted(tmp_path, outside, name):
    before = outside.read_bytes()
    folder = finished(tmp_path / "finished", name=name)
    with pytest.raises(ValmError, match=r"damaged.*(name: |lists numbers-00001)"):
        opened(folder)
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "build.json").write_text(json.dumps({"plan": PLAN}))
    entry = {**file_entry(outside), "name": name}
    (planted / "shard-00000.json").write_text(json.dumps({"count": 0, "files": [entry]}))
    build = ShardedBuild(planted, "heap", PLAN)
    for use in (build.done, build.abandon):
        with pytest.raises(ValmError, match=r"damaged.*; delete it or choose another folder"):
            use()
    assert outside.read_bytes() == before


def test_links_out_of_the_folder_are_refused(tmp_path, outside):
    for name in ("numbers-00000.npy", "manifest.json"):
        folder = finished(tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        with pytest.raises(PermissionError, match=r"leads out of its folder"):
            opened(folder)
