"""Compares the settings that a folder was made with and the settings of a run that continues it."""

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
    """Checks that the content of a folder was made with the current settings.

    Args:
        holds: the folder and its content, as the beginning of the error.
        there, here: the settings noted in the folder, as JSON, and the current settings.
        named: a user's name for a setting.

    Raises:
        ValmError: settings differ; the message names the first one.
    """
    now = json.loads(json.dumps(here))
    for name in dict.fromkeys([*now, *there]):
        before, after = there.get(name), now.get(name)
        if before != after:
            before, after = ("not given" if value is None else short(value) for value in (before, after))
            raise ValmError(f"{holds}: its {named(name)} is {before}, here it is {after}; {remedy}")
