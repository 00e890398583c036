from pathlib import Path

import pytest

from valm.errors import ValmError
from valm.pictures.plan import PicturesPlan


def plan_of(pictures, **more):
    return PicturesPlan(pictures=pictures, model="base", out="out", **more)


def test_the_format_follows_from_the_path(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    sources = {
        tmp_path: "pictures",
        tmp_path / "shards": "webdataset",
        Path("a.tar"): "webdataset",
        Path("a.CSV"): "csv",
    }
    assert {path: plan_of(path).images().format for path in sources} == sources
    assert plan_of("user/set").images().format == "pictures"  # no network unless asked
    assert plan_of("user/set", allow_download=True).images().format == "dataset"


def test_steps_follow_from_the_texts_within_bounds():
    assert [plan_of("x").training_steps(texts) for texts in (2, 1200, 100_000)] == [60, 225, 2000]
    assert plan_of("x", steps=7).training_steps(1200) == 7
    assert [plan_of("x").steps_of_clip(pictures) for pictures in (30, 1000, 100_000)] == [300, 1000, 3000]


def test_named_files_must_exist():
    with pytest.raises(ValmError, match=r"--questions: there is no none\.csv"):
        plan_of("x", questions="none.csv").check()
