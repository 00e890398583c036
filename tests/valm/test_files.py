import json
import os

import pytest

from valm.errors import ValmError
from valm.files import atomic_path, read_json, writable_folder, write_json


def test_atomic_path_moves_only_what_was_written_whole(tmp_path):
    target = tmp_path / "data.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"first")
        assert not target.exists()
    assert target.read_bytes() == b"first"

    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("killed")
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "data.bin"
    with atomic_path(target) as first:
        first.write_bytes(b"first")
        with atomic_path(target) as second:
            second.write_bytes(b"second, longer")
        assert target.read_bytes() == b"second, longer"
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"name": "été", "n": 3})
    assert read_json(tmp_path / "a.json", "the file") == {"name": "été", "n": 3}
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["n"] == 3


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(ValmError, match=r"cannot read the manifest .*b\.json: No such file"):
        read_json(tmp_path / "b.json", "the manifest")
    (tmp_path / "c.json").write_text('{"cut": ')
    with pytest.raises(ValmError, match=r"the manifest .*c\.json is damaged"):
        read_json(tmp_path / "c.json", "the manifest")


def test_writable_folder(tmp_path):
    assert writable_folder(tmp_path / "x" / "y").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValmError, match="cannot make the output folder"):
        writable_folder(tmp_path / "file" / "under")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValmError, match="permission denied"):
            writable_folder(tmp_path / "locked")
