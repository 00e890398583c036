"""Options and fields of a dataclass are the same thing, said once."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from valm.errors import ValmError
from valm.options import REQUIRED, add_fields, check_fields, given_fields, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Has one field of each kind."""

    out: str = option("where", REQUIRED)
    steps: int = option("how many", 3, least=1, below=10)
    rate: float | None = option("how fast", least=0)
    kind: str | None = option("which", choices=["a", "b"], short="-k")
    mix: bool = option("do not mix", True)
    resume: bool = option("go on", False)
    inner: list[int] = dataclasses.field(default_factory=list)


def given(dataclass, *words):
    parser = argparse.ArgumentParser()
    add_fields(parser, dataclass)
    return given_fields(dataclass, parser.parse_args(words))


def plan_of(*words):
    return Plan(**given(Plan, *words))


def test_what_is_not_given_is_the_default():
    assert plan_of("--out", "x") == Plan(out="x")
    found = plan_of("--out", "x", "--steps", "4", "-k", "b", "--no-mix", "--resume", "--rate", "0.5")
    assert found == Plan(out="x", steps=4, kind="b", mix=False, resume=True, rate=0.5)


def test_a_field_without_a_default_is_required():
    with pytest.raises(SystemExit):
        plan_of("--steps", "4")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "--steps is 0, expected at least 1 and below 10"),
        ({"steps": 10}, "--steps is 10, expected at least 1 and below 10"),
        ({"rate": float("nan")}, "--rate is nan, expected at least 0"),
        ({"kind": "c"}, "--kind must be one of a, b, got 'c'"),
    ],
)
def test_other_values_are_refused_whoever_gives_them(fields, message):
    check_fields(Plan(out="x"))
    with pytest.raises(ValmError, match=message):
        check_fields(Plan(out="x", **fields))


def test_paths_are_paths():
    @dataclasses.dataclass
    class Places:
        folder: str | os.PathLike | None = option("where")

    assert given(Places, "--folder", "a") == {"folder": Path("a")}


def test_the_items_of_a_repeated_option_add_up():
    @dataclasses.dataclass
    class Lists:
        words: Sequence[str] = option("which", ("none",), parse=lambda text: tuple(text.split(",")))

    assert given(Lists) == {}
    assert given(Lists, "--words", "a,b", "--words", "c") == {"words": ["a", "b", "c"]}
