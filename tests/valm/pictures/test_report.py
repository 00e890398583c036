"""The numbers of the report in words, and the single commands that it names."""

import shlex

import pytest

from valm.cli import build_parser
from valm.options import given_fields
from valm.pictures.making import FAST, Making, look
from valm.pictures.plan import PicturesPlan
from valm.pictures.report import Row, commands, perplexities, verdict
from valm.training.plan import TrainingPlan


@pytest.fixture
def making(drawn, tmp_path):
    plan = PicturesPlan(pictures=drawn, model="base", out=tmp_path / "out", steps=12)
    making = Making(plan, look(plan))
    making.begin()
    making.note("model", {"eval_perplexity": 36.0, "eval_perplexity_base": 240.0})
    making.note("control", {"eval_perplexity": 40.0, "eval_perplexity_base": 240.0})
    making.note(FAST, ["limit_softmax"])
    return making


def test_three_perplexities_and_a_sentence(making):
    rows = perplexities(making)
    assert [(row.label, row.value) for row in rows] == [
        ("base as it was", 240.0),
        ("trained with random pictures", 40.0),
        ("trained with your pictures", 36.0),
    ]
    assert rows[0].bar == 1 and rows[2].bar == pytest.approx(0.15)
    assert verdict(rows) == "Your pictures lower the perplexity by 10.0% compared with random pictures."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((40.0, 40.2), "no clear difference"),
        ((36.0, 40.0), "did not help: with random pictures the perplexity is 10.0%"),
    ],
)
def test_says_so_if_pictures_do_not_help(values, said):
    assert said in verdict([Row("", value, 1.0) for value in values])


def test_the_commands_give_the_plans_that_ran(making):
    lines = commands(making)
    parsed = [build_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert [line.split()[1] for line in lines] == ["clip", "kb", "retrieve", "train", "train"]
    again = TrainingPlan(**given_fields(TrainingPlan, parsed[3]))
    ran = making.training_plan("model", None)
    for name in ("base", "steps", "batch_size", "limit_softmax", "cache_below", "twin", "min_score", "base_kl"):
        assert getattr(again, name) == getattr(ran, name), name
    assert parsed[3].fields == {"save_steps": 2.0} and again.validation == "0.1" and parsed[4].twin == "random"
