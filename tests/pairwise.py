"""Cases in which each pair of values of a matrix occurs, instead of all combinations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def pairwise(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """`parametrize` over the names and values of `axes`, two or more."""
    return pytest.mark.parametrize(tuple(axes), list(map(tuple, AllPairs([list(values) for values in axes.values()]))))
