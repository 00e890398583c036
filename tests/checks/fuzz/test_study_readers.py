"""As test_store_readers.py, for what is read of a study: its config, pictures, finished stages and results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import strategies as st

from studies.color.config import read_config
from studies.color.pictures import PICTURES_FILE, read_pictures
from studies.color.report import TABLES
from studies.color.results import read_results
from studies.stages import Stages
from tests.checks.fuzz.mutations import ODD_VALUES, ODD_YAML, REFUSED, check_mutants, fuzzed, result_of
from tests.studies.color import synthetic

pytestmark = pytest.mark.slow


@fuzzed(300)
def test_results(tmp_path_factory, outside, data):
    """Whatever is read can be reported: a table is written, or refused in a sentence."""
    files = synthetic.write(tmp_path_factory.mktemp("results"))

    def report() -> Any:
        results = read_results(files)
        return [table(results) for name, table in TABLES.items() if name != "differences"]

    check_mutants(data, files, outside, report, ...)


@fuzzed(100)
def test_stages(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("stages")
    file, outside = folder / "stages.json", folder / "empty.json"
    outside.write_text("{}")
    Stages(file, progress=False)("text", lambda: None)
    check_mutants(data, [file], outside, lambda: Stages(file).seconds, ...)


@fuzzed(200)
def test_pictures(tmp_path_factory, outside, data):
    folder = tmp_path_factory.mktemp("pictures")
    one = {
        "file": "a.png",
        "caption": "an apple",
        "source": "noto",
        "thing": "apple",
        "color": "red",
        "exchanged_color": None,
    }
    (folder / PICTURES_FILE).write_text(json.dumps([one, one | {"thing": None}]))
    check_mutants(data, [folder / PICTURES_FILE], outside, lambda: read_pictures(folder), ...)


CONFIG = {"name": "small", "language_model": "base", "pictures": {"noto": {}}, "clip": {}, "text": {}, "training": {}}


@fuzzed(300)
def test_config(tmp_path_factory, outside, data):
    file = tmp_path_factory.mktemp("config") / "study.yaml"
    odd = st.one_of(st.sampled_from(ODD_YAML), st.sampled_from(ODD_VALUES).map(lambda value: json.dumps(value)))
    name = data.draw(st.sampled_from([*CONFIG, "images", "arms", "tests", "seeds"]))
    lines = [f"{key}: {json.dumps(value)}" for key, value in CONFIG.items() if key != name]
    file.write_text("\n".join([*lines, f"{name}: {data.draw(odd)}"]))
    found = result_of(lambda: read_config(file))
    assert found is REFUSED or found.to_json()
    check_mutants(data, [file], outside, lambda: read_config(file), ...)
