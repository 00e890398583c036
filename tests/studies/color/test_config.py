import dataclasses
from pathlib import Path

import pytest

from studies.color import config as study_config
from studies.color.config import ARMS, arm_of, read_config
from valm.errors import ValmError

SMALL = """\
name: tiny
language_model: model
pictures: {openmoji: , folder: {limit: 3}}
clip: {steps: 2}
text: {glosses: {}}
training: {steps: 3, lr: 2e-3}
curve: [1, 3, 9]
arms: [base, valm, control, random]
seeds: [3]
"""


def config_of(tmp_path, text=SMALL):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return read_config(file)


def test_fields_and_defaults(tmp_path):
    config = config_of(tmp_path)
    assert config.pictures == {"openmoji": {}, "folder": {"limit": 3}}
    assert (config.arms, config.seeds, config.images) == (("base", "valm", "control", "random"), (3,), 4)
    assert "memory_color" in config.tests


def test_the_recipe_is_of_what_results_depend_on(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    assert dataclasses.replace(config, name="other", seeds=(0, 1), arms=("valm",)).recipe == config.recipe
    for change in ({"training": {"steps": 4}}, {"images": 2}, {"text": {}}, {"clip": {"steps": 3}}, {"curve": (1,)}):
        assert dataclasses.replace(config, **change).recipe != config.recipe
    before = config.recipe
    monkeypatch.setattr(study_config, "RECIPE_VERSION", 1)
    assert config.recipe != before


def test_a_curve_trains_valm_and_its_control_for_each_number_of_steps_once(tmp_path):
    config = config_of(tmp_path)
    steps = {one.name: (one.arm, one.options["steps"]) for one in config.trainings}
    valm, control = ARMS["valm"], ARMS["control"]
    assert steps == {
        **{"valm": (valm, 3), "control": (control, 3), "random": (ARMS["random"], 3)},
        **{"valm-1": (valm, 1), "control-1": (control, 1), "valm-9": (valm, 9), "control-9": (control, 9)},
    }
    assert {one.options["lr"] for one in config.trainings} == {"2e-3"}
    assert all(arm_of(name) == arm for name, (arm, _) in steps.items())
    assert [arm_of(name) for name in ("valm-", "valm-x", "base-3", "random-3", "twin")] == [None] * 5
    assert [one.name for one in dataclasses.replace(config, arms=("base", "valm")).trainings] == [
        "valm",
        "valm-1",
        "valm-9",
    ]


def test_the_studies_of_the_repository_are_read():
    folder = Path(study_config.__file__).parent
    fifth, small = (read_config(folder / f"{name}.yaml") for name in ("fifth", "small"))
    assert fifth.seeds == (20, 21, 22, 23, 24) and fifth.arms == tuple(ARMS)
    assert fifth.curve == (60, 120, 240, 480, 960) and fifth.training["steps"] == 480
    assert small.arms == ("base", "valm", "control") and not small.curve
    assert {**small.training, "steps": 480} == fifth.training and fifth.training["min_score"] == "auto"
    assert read_config(folder / "gpu.yaml").arms == tuple(ARMS)


@pytest.mark.parametrize("name", ["full", "fourth"])
def test_a_study_of_earlier_code_names_its_commit(name):
    with pytest.raises(
        ValmError, match=r"needs the code of commit 417d903147d369b0e9dc1b31d0c1684ca649c40f: run it in"
    ):
        read_config(Path(study_config.__file__).parent / f"{name}.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("arms: [base, valm,", "arms: [base, vlam,", "arms[1]: Value error, no known arm: 'vlam', did you mean valm?"),
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
