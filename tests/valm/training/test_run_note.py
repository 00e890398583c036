"""What a resumed training may change."""

from dataclasses import fields

from valm.training.plan import TrainingPlan
from valm.training.run_note import FREE


def test_what_may_change_are_options():
    assert not FREE - {field.name for field in fields(TrainingPlan)}
