import dataclasses
from pathlib import Path

import pytest

from studies.color import config as study_config
from studies.color.config import ARMS, read_config
from valm.errors import ValmError

SMALL = """\
name: tiny
language_model: model
pictures: {openmoji: , folder: {limit: 3}}
clip: {steps: 2}
text: {glosses: {}}
training: {steps: 3}
arms: [twin, cut]
seeds: [3]
"""


def config_of(tmp_path, text=SMALL):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return read_config(file)


def test_fields_and_defaults(tmp_path):
    config = config_of(tmp_path)
    assert config.pictures == {"openmoji": {}, "folder": {"limit": 3}}
    assert (config.arms, config.seeds, config.images) == (("twin", "cut"), (3,), 4)
    assert "memory_color" in config.tests


def test_the_recipe_is_of_what_results_depend_on(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    assert dataclasses.replace(config, name="other", seeds=(0, 1), arms=("twin",)).recipe == config.recipe
    for change in ({"training": {"steps": 4}}, {"images": 2}, {"text": {}}, {"clip": {"steps": 3}}):
        assert dataclasses.replace(config, **change).recipe != config.recipe
    before = config.recipe
    monkeypatch.setattr(study_config, "RECIPE_VERSION", 1)
    assert config.recipe != before


def test_the_studies_of_the_repository_are_read():
    folder = Path(study_config.__file__).parent
    full = read_config(folder / "full.yaml")
    assert (full.name, full.seeds) == ("third", (10, 11, 12, 13, 14))
    fourth = read_config(folder / "fourth.yaml")
    assert (fourth.training, fourth.clip, fourth.text) == (full.training, full.clip, full.text)
    assert {*full.arms, *fourth.arms} == {*ARMS} and fourth.seeds == (15, 16, 17, 18, 19)
    assert (full.recipe, fourth.recipe) == ("e96398966bf6", "548dde697046")  # of the results in studies/results
    small = read_config(folder / "small.yaml")
    assert small.arms == ("base", "cut", "blind") and not small.reading
    assert read_config(folder / "gpu.yaml").recipe != full.recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("arms: [twin, cut]", "arms: [twim, cut]", "arms[0]: Value error, no known arm: 'twim', did you mean twin?"),
        ("seeds: [3]", "seed: [3]", "seed: Unexpected keyword argument"),
        ("limit: 3", "limit: -1", "greater than or equal to 1, got -1"),
        ("limit: 3", "number: 3", "pictures.folder.number: Extra inputs are not permitted"),
        ("text: {glosses: {}}", "text: {lambada: {}}", "text.lambada: Extra inputs are not permitted"),
        ("clip: {steps: 2}", "clip: {steps: 2026-01-01}", "date is not JSON"),
        ("name: tiny\n", "", "name: Field required"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, said):
    with pytest.raises(ValmError, match="study") as error:
        config_of(tmp_path, SMALL.replace(old, new))
    assert said in str(error.value)
