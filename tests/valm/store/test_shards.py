import json

import numpy as np
import pytest

from valm.errors import ValmError
from valm.store import shards
from valm.store.files import read_json
from valm.store.manifest import Manifest, file_entry, files_of, open_array, open_manifest
from valm.store.shard_progress import ProgressBar
from valm.store.shards import ShardedBuild, ShardFiles, run_here
from valm_kernels.atomic_files import temporary_file, temporary_name

PLAN = {"source": "numbers", "size": 3}


class Silent:
    def begin(self, units):
        pass

    def advance(self, units, skipped=0):
        pass


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


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def finish(build):
    build.finish({"format": "valm heap", "version": 3})


def test_shards_may_be_written_in_any_order_and_not_twice(tmp_path):
    for name, run in (("one", run_here), ("other", run_backwards)):
        started = build(tmp_path / name)
        started.write(write(started.out, []), [4], run, Silent())
        written = []
        resumed = build(tmp_path / name)
        resumed.write(write(resumed.out, written), [4, 5, 6], run, Silent())
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
    started.write(write(started.out, []), [4, 5], run_here, Silent())
    left = contents(tmp_path)
    finish(started)
    finished = contents(tmp_path)
    for name in ("build.json", "shard-00001.json"):
        (tmp_path / name).write_bytes(left[name])
    again = build(tmp_path)
    assert again.finished and len(again.done()) == 2
    assert contents(tmp_path) == finished


def test_the_manifest_is_read_once_in_a_build(tmp_path, monkeypatch):
    started = build(tmp_path)
    started.write(write(tmp_path, []), [4, 5], run_here, Silent())
    finish(started)
    read = []
    monkeypatch.setattr(shards, "read_json", lambda path, *how: read.append(path.name) or read_json(path, *how))
    again = build(tmp_path)
    with again.writing():
        again.write(write(tmp_path, []), [4, 5], run_here, Silent())
        assert again.finished and len(again.done()) == 2
    assert read == ["manifest.json"]


@pytest.mark.parametrize("end", [finish, ShardedBuild.abandon])
def test_what_killed_tries_left_is_removed_at_the_end(tmp_path, end):
    started = build(tmp_path)
    names = ("numbers-00001.npy", "shard-00001.json", "build.json", "manifest.json", "index.faiss")
    for name in names:
        temporary_name(tmp_path / name).touch()
    (tmp_path / "notes.tmp").touch()
    with temporary_file(tmp_path / "index.faiss") as of_a_writer_that_lives:
        end(started)
        assert set(tmp_path.glob("*.tmp")) == {of_a_writer_that_lives, tmp_path / "notes.tmp"}


def test_another_writer_is_refused_and_finds_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("valm.store.files.WAIT_SECONDS", 0)
    first, second = build(tmp_path), build(tmp_path)
    with first.writing():
        message = r"another process is writing the heap .*; when it has ended, run"
        with pytest.raises(ValmError, match=message), second.writing():
            pass
        finish(first)
    assert not second.finished
    with second.writing():
        assert second.finished


def test_what_differs_from_the_plan_is_named(tmp_path):
    started = build(tmp_path)
    with pytest.raises(ValmError, match=r"holds an unfinished heap .*\(colour, size differ\); delete it or choose"):
        build(tmp_path, {**PLAN, "size": 4, "colour": "red"})
    finish(started)
    with pytest.raises(ValmError, match=r"already holds a heap .*\(size, source differ\); choose another folder"):
        build(tmp_path, {})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(
        ValmError, match=r"the manifest .*manifest\.json is damaged: it is a list of 0, expected an obj"
    ):
        build(tmp_path)


def test_abandoning_leaves_nothing(tmp_path):
    started = build(tmp_path)
    started.write(write(started.out, []), [4, 5], run_here, Silent())
    started.abandon()
    assert contents(tmp_path) == {}


def test_a_folder_of_another_format_or_version_is_named(tmp_path):
    with pytest.raises(ValmError, match=r"no heap at .*none: there is no such folder"):
        open_manifest(tmp_path / "none", "heap", 3, "make heap", Manifest)
    with pytest.raises(ValmError, match=r"is not a heap: it has no manifest\.json; make one with `make heap`"):
        open_manifest(tmp_path, "heap", 3, "make heap", Manifest)
    started = build(tmp_path)
    with pytest.raises(ValmError, match="is unfinished; run `make heap` again, it resumes where it stopped"):
        open_manifest(tmp_path, "heap", 3, "make heap", Manifest)
    started.write(write(started.out, []), [4], run_here, Silent())
    finish(started)
    with pytest.raises(ValmError, match="is not the manifest of a pile"):
        open_manifest(tmp_path, "pile", 3, "make pile", Manifest)
    with pytest.raises(ValmError, match="has format version 3, this valm reads 4; make it again"):
        open_manifest(tmp_path, "heap", 4, "make heap", Manifest)
    (tmp_path / "numbers-00000.npy").unlink()
    with pytest.raises(ValmError, match=r"numbers-00000\.npy is missing; make it again"):
        open_manifest(tmp_path, "heap", 3, "make heap", Manifest)


def test_an_array_is_what_the_manifest_says(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4, dtype=np.int32))
    assert isinstance(open_array(tmp_path / "a.npy", (4,), np.int32), np.memmap)
    for shape, dtype in (((5,), np.int32), ((4,), np.int64)):
        with pytest.raises(ValmError, match=r"a\.npy holds int32 \(4,\), the manifest says"):
            open_array(tmp_path / "a.npy", shape, dtype)
    (tmp_path / "a.npy").write_text(json.dumps([1, 2]))
    with pytest.raises(ValmError, match=r"a\.npy is damaged"):
        open_array(tmp_path / "a.npy", (4,), np.int32)


def test_the_bar_guesses_the_whole_from_the_shards_begun(capsys):
    with ProgressBar("write", " numbers", 4, True) as bar:
        bar.begin(100)
        bar.advance(100, skipped=2)
        bar.begin(300)
        bar.advance(200)
    line = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "300/800" in line and "skipped=2" in line and "numbers/s" in line
