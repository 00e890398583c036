"""The folder of `python -m studies.harm`."""

import json

import pytest

from studies import harm
from valm.errors import ValmError


def test_a_folder_of_another_seed_or_other_settings_is_refused(tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    harm.note_settings(base, out, 3)
    (out / "pictures").mkdir()
    harm.note_settings(base, out, 3)
    assert json.loads((out / "harm.json").read_text())["seed"] == 3
    for other in ((base, out, 4), (tmp_path / "other", out, 3)):
        with pytest.raises(ValmError, match=r"out holds another study: its (seed|base) is .*; choose another folder"):
            harm.note_settings(*other)
    with monkeypatch.context() as patched:
        patched.setattr(harm, "PICTURES", 20)
        with pytest.raises(ValmError, match="its pictures is 300, here it is 20"):
            harm.note_settings(base, out, 3)
