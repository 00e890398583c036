"""Files of a model that are replaced together. Kills at every point: tests/checks/test_kills.py."""

import errno
import os
import stat
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from tests.valm.models import tiny_model
from valm.store import folders
from valm.store.folders import NEW_FOLDER, atomic_folder, current_files, replaced_files


def write(folder, contents):
    with replaced_files(folder, "the model") as temporary:
        for name, content in contents.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(content)


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as temporary:
        (temporary / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other") as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError("stopped")
    assert os.listdir(tmp_path) == ["folder"]


def test_folders_in_a_folder_stay_open(tmp_path):
    """Files get the mode of the umask, whatever made them; folders keep what lets one look into them."""
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").touch(0o600)
    mode = (tmp_path / "folder").stat().st_mode
    assert (tmp_path / "folder" / "inner").stat().st_mode == mode
    assert (tmp_path / "folder" / "inner" / "file").stat().st_mode & 0o777 == mode & 0o666


def test_files_take_the_places_of_the_old_ones(tmp_path):
    write(tmp_path, {"a": "1", "b": "1", "templates/tool.jinja": "1"})
    (tmp_path / "notes").write_text("mine")
    write(tmp_path, {"a": "2", "c": "2", "templates/tool.jinja": "2"})
    assert contents(tmp_path) == {"a": "2", "b": "1", "c": "2", "notes": "mine", "templates/tool.jinja": "2"}
    assert current_files(tmp_path) == tmp_path


@pytest.mark.skipif(os.name != "posix", reason="files have modes")
def test_files_have_the_mode_that_the_umask_says(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            folder = tmp_path / str(umask)
            with replaced_files(folder, "the model") as temporary:
                save_file({"a": torch.zeros(1)}, temporary / "model.safetensors")
                (temporary / "config.json").write_text("{}")
            tiny_model().save_pretrained(folder / "by transformers")
        finally:
            os.umask(before)
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert len(files) >= 4 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


@pytest.mark.skipif(os.name != "posix", reason="files have modes")
def test_a_file_system_without_modes_is_written(tmp_path, monkeypatch):
    refused = PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(Path, "chmod", Mock(side_effect=refused))
    with replaced_files(tmp_path / "own", "the model") as temporary:
        save_file({"a": torch.zeros(1)}, temporary / "model.safetensors")
    tiny_model().save_pretrained(tmp_path / "by transformers")
    assert (tmp_path / "own" / "model.safetensors").exists()
    assert (tmp_path / "by transformers" / "config.json").exists()


def test_until_all_are_there_the_new_ones_count(tmp_path, monkeypatch):
    write(tmp_path, {"a": "1"})
    with monkeypatch.context() as patch:
        patch.setattr(folders, "link", Mock(side_effect=OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, {"a": "2"})
    assert (tmp_path / "a").read_text() == "1"
    assert current_files(tmp_path) == tmp_path / NEW_FOLDER and (tmp_path / NEW_FOLDER / "a").read_text() == "2"
    write(tmp_path, {"b": "3"})
    assert contents(tmp_path) == {"a": "2", "b": "3"}


def test_another_writer_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SAVE_WAIT_SECONDS", 0)
    with replaced_files(tmp_path, "the model") as temporary:
        (temporary / "a").write_text("1")
        with pytest.raises(TimeoutError, match="another process is writing there"):
            write(tmp_path, {"a": "2"})
    assert (tmp_path / "a").read_text() == "1"


def test_a_checkpoint_takes_the_place_of_an_adapter(tmp_path):
    for names in (("image_fusion.json", "image_fusion.safetensors"), ("config.json", "model.safetensors")):
        write(tmp_path, dict.fromkeys(names, "{}"))
    assert set(contents(tmp_path)) == {"config.json", "model.safetensors"}
