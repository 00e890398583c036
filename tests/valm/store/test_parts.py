import json

import pytest

from valm.errors import ValmError
from valm.store.parts import MODEL, base_of, control_of, part_of


@pytest.fixture
def made(tmp_path):
    parts = {"model": "model", "control": "random"}
    about = {"format": "valm pictures", "version": 1, "parts": parts, "settings": {"--model": "llama"}}
    (tmp_path / "pictures.json").write_text(json.dumps(about))
    (tmp_path / "stages.json").write_text(json.dumps({"model": 1.5}))
    return tmp_path


def test_a_folder_without_the_file_is_its_own_part(tmp_path):
    assert part_of(tmp_path, MODEL) == tmp_path and control_of(tmp_path) is None and base_of(tmp_path) is None


def test_finds_finished_parts(made):
    assert part_of(made, MODEL) == made / "model" and base_of(made) == "llama"
    with pytest.raises(ValmError, match="no finished control: run its `valm pictures` command again"):
        control_of(made)
    (made / "stages.json").unlink()
    with pytest.raises(ValmError, match="no finished model"):
        part_of(made, MODEL)


@pytest.mark.parametrize("name", ["../model", "/model", "", "a/b"])
def test_no_part_is_outside_of_the_folder(made, name):
    about = json.loads((made / "pictures.json").read_text())
    (made / "pictures.json").write_text(json.dumps(about | {"parts": {"model": name}}))
    with pytest.raises(ValmError, match="damaged"):
        part_of(made, MODEL)


def test_the_file_may_not_be_a_link_out_of_the_folder(made, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pictures.json"
    (made / "pictures.json").rename(elsewhere)
    (made / "pictures.json").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"pictures\.json"):
        part_of(made, MODEL)
