"""`Opening`."""

import pytest
import torch

from valm.clip.text_tower import fastest_dtype
from valm.errors import ValmError
from valm.model.opening import Opening


def test_the_precision_of_queries():
    assert Opening().torch_query_dtype() is None
    assert Opening(query_dtype="bfloat16").torch_query_dtype() is torch.bfloat16
    assert Opening(query_dtype="auto", device="cpu").torch_query_dtype() is fastest_dtype(torch.device("cpu"))
    with pytest.raises(ValmError, match="--query-dtype must be one of float32, bfloat16, int8, auto, got 'float64'"):
        Opening(query_dtype="float64")
