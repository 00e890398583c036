"""Whatever a manifest or a record says, nothing outside of the folder is read, and nothing is deleted."""

import json
import os

import numpy as np
import pytest

from tests.valm.store.manifests import edit_manifest
from valm.errors import ValmError
from valm.store.manifest import Manifest, file_entry, open_array, open_manifest
from valm.store.shards import ShardedBuild, ShardFiles

PLAN = {"source": "numbers"}


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    file = tmp_path / "outside" / "numbers-00000.npy"
    np.save(file, np.arange(3))
    return file


def finished(folder, **change):
    build = ShardedBuild(folder, "heap", PLAN)
    files = ShardFiles(folder, 0)
    files.write_array("numbers", np.arange(3))
    files.finish(count=3)
    build.finish({"format": "valm heap", "version": 1})
    (shard,) = json.loads((folder / "manifest.json").read_text())["shards"]
    shard["files"][0] |= change
    edit_manifest(folder, shards=[shard])
    return folder


def opened(folder):
    return open_manifest(folder, "heap", 1, "make heap", Manifest)


def test_a_manifest_with_one_changed_bit_is_refused(tmp_path):
    """Whatever that bit says."""
    folder = finished(tmp_path / "finished")
    file = folder / "manifest.json"
    whole, meant = file.read_bytes(), opened(folder)
    for bit in np.random.default_rng(0).choice(8 * len(whole), 250, replace=False).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            opened(folder)
        except ValmError:
            continue
        assert json.loads(changed) == meant, f"bit {bit}: {bytes(changed)!r}"


@pytest.mark.parametrize(
    "name",
    [
        "../outside/numbers-00000.npy",
        "numbers-00000.npy/../../outside/numbers-00000.npy",
        "numbers-x/../../outside/stolen.npy",
        "/etc/passwd",
        "numbers-00000.npy\n",
        "numbers-00000.npy\0",
        "numbers-00000.py",
        "numbers-00001.npy",
        ".",
        "",
    ],
)
def test_names_that_are_not_ours_are_neither_read_nor_deleted(tmp_path, outside, name):
    before = outside.read_bytes()
    folder = finished(tmp_path / "finished", name=name)
    with pytest.raises(ValmError, match=r"damaged.*(name is|lists numbers-00001)"):
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


@pytest.mark.parametrize("kind", ["link out", "pipe", "device", "folder"])
def test_what_is_no_file_of_the_folder_is_refused_before_it_is_opened(tmp_path, outside, kind):
    for name in ("numbers-00000.npy", "manifest.json"):
        folder = finished(tmp_path / name)
        (folder / name).unlink()
        if kind == "link out":
            (folder / name).symlink_to(outside)
        elif kind == "device":
            (folder / name).symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).mkdir()
        with pytest.raises(ValmError, match=r"is damaged: .*(leads out|is a pipe|is a folder)"):
            opened(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY\x01\x00", b"x" * 200, b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((("]
)
def test_damaged_headers(tmp_path, content):
    (tmp_path / "numbers.npy").write_bytes(content)
    with pytest.raises(ValmError, match=r"numbers\.npy is damaged: .*; make it again"):
        open_array(tmp_path / "numbers.npy", (3,), np.int64)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(ValmError, match=r"^cannot read .*numbers\.npy: .*Permission denied"):
        open_array(tmp_path / "numbers.npy", (3,), np.int64)
