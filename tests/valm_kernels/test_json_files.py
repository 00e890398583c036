"""JSON that is none is named, and a link that leads out of a folder is none of its files."""

import os

import pytest

from valm_kernels.json_files import check_own, check_regular, read_json, short


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b"[" * 200_000, b""])
def test_files_that_are_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is damaged, it is not JSON: "):
        read_json(tmp_path / "a.json")


def test_links_out_of_a_folder_are_refused(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    (tmp_path / "outside").write_text("{}")
    (folder / "file").write_text("{}")
    (folder / "out").symlink_to("../outside")
    (folder / "absolute").symlink_to(tmp_path / "outside")
    (folder / "within").symlink_to("file")
    for name in ("out", "absolute"):
        with pytest.raises(PermissionError, match="is a link that leads out of its folder"):
            check_own(folder / name)
    assert check_own(folder / "within").st_size == check_own(folder / "file").st_size == 2
    (tmp_path / "linked").symlink_to(folder)
    check_own(tmp_path / "linked" / "file")  # the store itself may be behind a link
    with pytest.raises(FileNotFoundError):
        check_own(folder / "none")


def test_a_snapshot_in_the_cache_of_a_hub_has_links_to_its_blobs(tmp_path):
    cache, outside = tmp_path / "models--someone--store", tmp_path / "outside"
    snapshot, blobs = cache / "snapshots" / "revision", cache / "blobs"
    for folder in (snapshot / "below", blobs / "folder", outside):
        folder.mkdir(parents=True)
    for file in (blobs / "file", blobs / "folder" / "file", outside / "file"):
        file.write_text("{}")
    (blobs / "link").symlink_to(outside / "file")
    os.mkfifo(blobs / "pipe")
    for link, target in (("file", "../../blobs/file"), ("below/file", "../../../blobs/file")):
        (snapshot / link).symlink_to(target)
        assert check_own(snapshot / link).st_size == 2
    for name, target in (("link", "blobs/link"), ("pipe", "blobs/pipe"), ("deep", "blobs/folder/file")):
        (snapshot / name).symlink_to(cache / target)
        with pytest.raises(PermissionError, match="not a regular file" if name == "pipe" else "leads out"):
            check_own(snapshot / name)
    (outside / "other").symlink_to(blobs / "file")
    with pytest.raises(PermissionError, match="leads out"):
        check_own(outside / "other")


@pytest.mark.parametrize("check", [check_own, check_regular])
def test_pipes_and_devices_are_refused(tmp_path, check):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(PermissionError, match="this is not a regular file"):
            check(path)


def test_values_are_shown_on_one_short_line():
    assert short([1, 2]) == "a list of 2" and short({}) == "an object of 0"
    assert short("a\nb") == "'a\\nb'" and len(short("x" * 1000)) < 70
    assert short(10**400) == "a number of more than 60 digits"
