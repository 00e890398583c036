import dataclasses
from pathlib import Path

import pytest

from studies.color import config as study_config
from studies.color.config import read_config
from valm.errors import ValmError

SMALL = """\
name: tiny
language_model: model
pictures: {openmoji: , folder: {limit: 3}}
clip: {steps: 2}
text: {glosses: {}}
training: {steps: 3}
arms: [twin, valm]
seeds: [3]
"""


def config_of(tmp_path, text=SMALL):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return read_config(file)


def test_fields_and_defaults(tmp_path):
    config = config_of(tmp_path)
    assert config.pictures == {"openmoji": {}, "folder": {"limit": 3}}
    assert (config.arms, config.seeds, config.images) == (("twin", "valm"), (3,), 4)
    assert "memory_color" in config.tests


def test_the_recipe_is_of_what_results_depend_on(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    assert dataclasses.replace(config, name="other", seeds=(0, 1), arms=("twin",)).recipe == config.recipe
    for change in ({"training": {"steps": 4}}, {"images": 2}, {"text": {}}, {"clip": {"steps": 3}}):
        assert dataclasses.replace(config, **change).recipe != config.recipe
    before = config.recipe
    monkeypatch.setattr(study_config, "RECIPE_VERSION", 1)
    assert config.recipe != before


def test_the_arms_of_a_seed_and_their_settings(tmp_path):
    changed = SMALL.replace(
        "seeds: [3]", "seeds: [3, 4]\nsome_seeds: {twin: [4]}\ntraining_of: {valm: {steps: , lr: 1}}"
    )
    config = config_of(tmp_path, changed)
    assert [list(config.arms_of(seed)) for seed in (3, 4)] == [["valm"], ["twin", "valm"]]
    assert config.training_settings("valm") == {"lr": 1}
    assert config.training_settings("twin") == {"steps": 3}
    assert config.recipe != config_of(tmp_path).recipe


def test_the_studies_of_the_repository_are_read():
    folder = Path(study_config.__file__).parent
    full = read_config(folder / "full.yaml")
    assert (len(full.arms_of(5)), len(full.arms_of(9)), full.seeds) == (12, 6, (5, 6, 7, 8, 9))
    assert read_config(folder / "small.yaml").arms == ("twin", "valm", "blind")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("arms: [twin, valm]", "arms: [twin, valn]", "arms[1]: Value error, no known arm: 'valn', did you mean valm?"),
        ("seeds: [3]", "some_seeds: {twim: [3]}", "no known arm: 'twim', did you mean twin?"),
        ("seeds: [3]", "training_of: {twin: 3}", "training_of.twin: Input should be an object, got 3"),
        ("seeds: [3]", "seed: [3]", "seed: Unexpected keyword argument"),
        ("limit: 3", "limit: -1", "greater than or equal to 1, got -1"),
        ("limit: 3", "number: 3", "pictures.folder.number: Extra inputs are not permitted"),
        ("text: {glosses: {}}", "text: {lambada: {}}", "text.lambada: Extra inputs are not permitted"),
        ("clip: {steps: 2}", "clip: {steps: 2026-01-01}", "date is not JSON"),
        ("clip: {steps: 2}", "clip: {steps: 2}\ncolorless_clip: {drawn: 0}", "greater than or equal to 1, got 0"),
        ("name: tiny\n", "", "name: Field required"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, said):
    with pytest.raises(ValmError, match="study") as error:
        config_of(tmp_path, SMALL.replace(old, new))
    assert said in str(error.value)
