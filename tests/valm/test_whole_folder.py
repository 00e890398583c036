"""Files of a model that are replaced together. Kills at every point: tests/fuzz/test_kills.py."""

import pytest

from valm import whole_folder
from valm.errors import ValmError
from valm.whole_folder import NEW_FOLDER, current_files, replaced_files


def write(folder, **contents):
    with replaced_files(folder, "the model") as temporary:
        for name, content in contents.items():
            (temporary / name).write_text(content)


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_files_take_the_places_of_the_old_ones(tmp_path):
    write(tmp_path, a="1", b="1")
    (tmp_path / "notes").write_text("mine")
    write(tmp_path, a="2", c="2")
    assert contents(tmp_path) == {
        "a": "2",
        "b": "1",
        "c": "2",
        "notes": "mine",
    }
    assert current_files(tmp_path) == tmp_path


def test_until_all_are_there_the_new_ones_count(tmp_path, monkeypatch):
    write(tmp_path, a="1")
    with monkeypatch.context() as patch:
        patch.setattr(whole_folder, "_link", lambda file, target: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(ValmError, match=r"is whole in .*checkpoint\.new and loads from there"):
            write(tmp_path, a="2")
    assert (tmp_path / "a").read_text() == "1"
    assert current_files(tmp_path) == tmp_path / NEW_FOLDER and (tmp_path / NEW_FOLDER / "a").read_text() == "2"
    write(tmp_path, b="3")
    assert contents(tmp_path) == {"a": "2", "b": "3"}


def test_another_writer_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_folder, "WAIT_SECONDS", 0)
    with replaced_files(tmp_path, "the model") as temporary:
        (temporary / "a").write_text("1")
        with pytest.raises(ValmError, match=r"cannot write the model .*another process is writing there"):
            write(tmp_path, a="2")
    assert (tmp_path / "a").read_text() == "1"
