"""Compares the settings that a folder was made with before with those it is to be continued with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from valm.errors import ValmError
from valm_kernels.json_files import short


def check_same(
    holds: str,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    remedy: str,
    named: Callable[[str], str] = str,
) -> None:
    """Checks that what a folder holds was made with the settings of now.

    Args:
        holds: the folder and what is in it, as the error's beginning.
        there, here: the settings noted in the folder, as JSON has them, and those of now.
        named: what a user calls a setting.

    Raises:
        ValmError: they differ; it names the first one of `here` that does.
    """
    now = json.loads(json.dumps(here))
    for name in dict.fromkeys([*now, *there]):
        before, after = there.get(name), now.get(name)
        if before != after:
            before, after = ("not given" if value is None else short(value) for value in (before, after))
            raise ValmError(f"{holds}: its {named(name)} is {before}, here it is {after}; {remedy}")
