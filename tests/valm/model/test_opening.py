"""`Opening`."""

import pytest

from valm.errors import ValmError
from valm.model.opening import Opening


def test_the_precision_of_queries():
    assert Opening().query_dtype is None
    with pytest.raises(ValmError, match="--query-dtype must be one of float32, bfloat16, int8, got 'float64'"):
        Opening(query_dtype="float64")
