import os
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest

from tests.valm.store.manifests import check_every_bit_counts, contents, edit_manifest, replacements
from valm.errors import ValmError
from valm.store import shards
from valm.store.shards import (
    Part,
    ProgressBar,
    ShardedBuild,
    ShardRecord,
    open_manifest,
    read_manifest,
    read_shard,
    run_here,
    sharded_build,
)
from valm_kernels.atomic_files import temporary_file, temporary_name

PLAN = {"source": "numbers", "size": 3}
SCHEMA = pa.schema([("number", pa.int64())])


def numbers(count, progress):
    """A work: a shard of `count` numbers."""
    return pa.table({"number": np.arange(count)}, SCHEMA), {"count": count}


def parts(counts):
    return [Part(f"{count} numbers", count) for count in counts]


def write(out, counts, run=run_here, plan=PLAN, finish=True):
    with sharded_build(out, "heap", plan) as build:
        build.write(numbers, parts(counts), run, Mock())
        if finish and not build.finished:
            build.finish(version=3)
    return build


def run_backwards(task, shards, progress):
    run_here(task, reversed(list(shards)), progress)


def opened(folder, what="heap", version=3):
    return open_manifest(folder, what, version, f"make {what}")


def test_shards_may_be_written_in_any_order_and_not_twice(tmp_path, monkeypatch):
    written, write_shard = [], shards.write_shard
    counted = lambda out, work, number, *more: written.append(number) or write_shard(out, work, number, *more)  # noqa: E731
    for name, run in (("one", run_here), ("other", run_backwards)):
        with pytest.raises(KeyboardInterrupt), sharded_build(tmp_path / name, "heap", PLAN) as build:
            build.write(numbers, parts([4]), run, Mock())
            raise KeyboardInterrupt
        monkeypatch.setattr(shards, "write_shard", counted)
        write(tmp_path / name, [4, 5, 6], run)
        monkeypatch.setattr(shards, "write_shard", write_shard)
    assert sorted(written) == [1, 1, 2, 2]
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    manifest = opened(tmp_path / "one")
    assert [shard["count"] for shard in manifest["shards"]] == [4, 5, 6]
    assert manifest["plan"] == PLAN
    names = [f"shard-0000{number}.arrow" for number in range(3)]
    assert sorted(contents(tmp_path / "one")) == ["manifest.json", *names]
    tables = [read_shard(tmp_path / "one" / name, SCHEMA, count) for name, count in zip(names, (4, 5, 6), strict=True)]
    assert [table["number"].to_pylist() for table in tables] == [list(range(count)) for count in (4, 5, 6)]


def test_killed_between_the_manifest_and_the_end(tmp_path):
    write(tmp_path, [4, 5], finish=False)
    left = contents(tmp_path)
    write(tmp_path, [4, 5])
    finished = contents(tmp_path)
    for name in ("build.json", "shard-00001.json"):
        (tmp_path / name).write_bytes(left[name])
    with sharded_build(tmp_path, "heap", PLAN) as build:
        assert build.finished and len(build.done()) == 2
    assert contents(tmp_path) == finished


@pytest.mark.parametrize("end", ["finish", "abandon"])
def test_what_killed_tries_left_is_removed_at_the_end(tmp_path, end):
    write(tmp_path, [4, 5], finish=False)
    for name in ("shard-00001.arrow", "shard-00001.json", "build.json", "manifest.json", "index.faiss"):
        temporary_name(tmp_path / name).touch()
    (tmp_path / "notes.tmp").touch()
    with temporary_file(tmp_path / "index.faiss") as of_a_writer_that_lives:
        with sharded_build(tmp_path, "heap", PLAN) as build:
            getattr(build, end)()
        there = {of_a_writer_that_lives, tmp_path / "notes.tmp"}
        assert set(tmp_path.glob("*.tmp")) == there
        assert end == "finish" or set(tmp_path.iterdir()) == there


def test_another_writer_is_refused_and_finds_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0)
    with sharded_build(tmp_path, "heap", PLAN) as first:
        with pytest.raises(TimeoutError, match="another process is writing there"):
            write(tmp_path, [])
        first.finish(version=3)
    assert write(tmp_path, []).finished


def test_what_differs_from_the_plan_is_named(tmp_path):
    write(tmp_path, [], finish=False)
    with pytest.raises(ValmError, match="another unfinished heap: its size is 3, here it is 4; delete it or choose"):
        write(tmp_path, [], plan={**PLAN, "size": 4, "colour": "red"})
    write(tmp_path, [])
    with pytest.raises(ValmError, match=r"holds another heap: its (size|source) is .*; choose another folder"):
        write(tmp_path, [], plan={})
    edit_manifest(tmp_path, version=2, shards=[{"files": []}])  # as another version noted them
    with pytest.raises(ValmError, match="holds another heap: its size is 3, here it is 4; choose another folder"):
        write(tmp_path, [], plan={**PLAN, "size": 4})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValmError, match=r"the manifest .*manifest\.json is damaged: .*got a list of 0"):
        write(tmp_path, [])


@pytest.mark.parametrize("finish", [False, True])
def test_another_source_is_refused(tmp_path, finish):
    write(tmp_path, [4, 5], finish=finish)
    for changed, number in (([4, 6], 1), ([4], 1), ([], 0)):
        with pytest.raises(ValmError, match=rf"heap has changed since .* was begun \(its part {number}\); choose"):
            write(tmp_path, changed)
    if finish:
        with pytest.raises(ValmError, match=r"has changed since .* was begun \(its part 2\); choose"):
            write(tmp_path, [4, 5, 6])
    write(tmp_path, [4, 5])
    assert len(opened(tmp_path)["shards"]) == 2


def test_a_folder_of_another_format_or_version_is_named(tmp_path):
    def fails(message, folder=tmp_path, what="heap", version=3):
        with pytest.raises(ValmError, match=message):
            opened(folder, what, version)

    fails(r"no heap at .*none: there is no such folder", tmp_path / "none")
    fails(r"is not a heap: it has no manifest\.json. Make one with `make heap`")
    write(tmp_path, [3], finish=False)
    fails("is unfinished: run `make heap` again, it resumes where it stopped")
    write(tmp_path, [3])
    fails("is not the manifest of a pile", what="pile")
    fails("has format version 3, this valm reads 4; make it again", version=4)
    file = tmp_path / "shard-00000.arrow"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    fails(rf"shard-00000\.arrow has {len(content) - 1} bytes instead of {len(content)}; make it again")
    file.unlink()
    fails(r"shard-00000\.arrow is missing; make it again")


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, [3])
    file = tmp_path / "shard-00000.arrow"
    for schema, rows, message in (
        (pa.schema([("other", pa.string())]), 3, "it has number: int64, expected other: string"),
        (pa.schema([("number", pa.int32())]), 3, "it has number: int64, expected number: int32"),
        (SCHEMA, 4, "it has 3 rows, expected 4"),
    ):
        with pytest.raises(ValmError, match=rf"shard-00000\.arrow is damaged: {message}.*; make it again"):
            read_shard(file, schema, rows)
    with pa.ipc.new_file(str(file), SCHEMA) as writer:
        for _ in range(2):
            writer.write_table(numbers(2, None)[0])
    with pytest.raises(ValmError, match="it has 4 rows, expected 4 in one batch"):
        read_shard(file, SCHEMA, 4)
    for content in (b"", b"[1, 2]", file.read_bytes()[:-20], bytes(1000)):
        file.write_bytes(content)
        with pytest.raises(ValmError, match=r"shard-00000\.arrow is damaged: .*; make it again"):
            read_shard(file, SCHEMA, 3)


@pytest.mark.parametrize("fixed", [[], [2]])
@pytest.mark.parametrize("values", [[[1, 2], None], [[1, 2], [3, None]]])
def test_nulls_are_damage(tmp_path, values, fixed):
    """In a column, and in its lists."""
    inner = pa.list_(pa.int64(), *fixed)
    schema = pa.schema([("rows", inner), ("nested", pa.list_(inner)), ("note", pa.string())])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), schema) as writer:
        writer.write_table(pa.table({"rows": values, "nested": [values, []], "note": ["a", None]}, schema))
    for name in schema.names:
        with pytest.raises(ValmError, match=rf"a\.arrow is damaged: its {name} contains nulls; make it again"):
            read_shard(tmp_path / "a.arrow", pa.schema([schema.field(name)]), 2)
    notes = read_shard(tmp_path / "a.arrow", pa.schema([schema.field("note")]), 2, nullable=["note"])
    assert notes["note"].to_pylist() == ["a", None]


def test_a_shard_may_have_no_rows(tmp_path):
    write(tmp_path, [3, 0])
    assert len(read_shard(tmp_path / "shard-00001.arrow", SCHEMA, 0)) == 0


def test_a_sum_that_differs_from_its_shards_is_named(tmp_path):
    with sharded_build(tmp_path, "heap", PLAN) as build:
        build.write(numbers, parts([4, 5]), run_here, Mock())
        build.finish(version=3, count=9)
    assert open_manifest(tmp_path, "heap", 3, "make heap", sums=("count",))["count"] == 9
    edit_manifest(tmp_path, count=14)
    with pytest.raises(ValmError, match=r"manifest\.json is damaged: its count is 14, the sum over its shards is 9"):
        open_manifest(tmp_path, "heap", 3, "make heap", sums=("count",))


@pytest.mark.parametrize("changes", [{"shards": 7}, {"shards": [{}]}, {"plan": []}, {"version": "3"}, {"format": 1}])
def test_a_manifest_of_other_types_is_named(tmp_path, changes):
    write(tmp_path, [3])
    edit_manifest(tmp_path, **changes)
    with pytest.raises(ValmError, match=r"manifest|version"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.arrow"])
def test_what_is_no_regular_file_of_a_store_is_not_opened(tmp_path, name):
    """A pipe is waited for, a device never ends, and a link may lead to any file of this machine."""
    store = tmp_path / "store"
    write(store, [3])
    file = store / name
    for _ in replacements(file, tmp_path / "outside"):
        for read in (lambda: opened(store), lambda: read_manifest(store) and read_shard(file, SCHEMA, 3)):
            with pytest.raises(PermissionError, match=r"not a regular file|a link that leads out"):
                read()


@pytest.mark.parametrize("file", ["build.json", "shard-00000.json"])
def test_a_build_opens_no_pipe(tmp_path, file):
    write(tmp_path, [3], finish=False)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(PermissionError, match="not a regular file"):
        write(tmp_path, [3])


def test_the_bar_guesses_the_whole_from_the_shards_begun(capsys):
    with ProgressBar("write", " numbers", 6, True) as bar:
        bar.done = 2
        bar.begin(100)
        bar.advance(100, skipped=2)
        bar.begin(300)
        bar.advance(200)
    line = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "300/800" in line and "skipped=2" in line and "numbers/s" in line


def test_a_manifest_with_one_changed_bit_is_refused(tmp_path):
    """Whatever that bit says."""
    write(tmp_path, [3])
    check_every_bit_counts(tmp_path / "manifest.json", lambda: opened(tmp_path), 250)


def test_a_file_that_is_not_ours_is_not_written_over(tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(ValmError, match="is not empty"):
        ShardedBuild(tmp_path, "heap", PLAN, ShardRecord)
