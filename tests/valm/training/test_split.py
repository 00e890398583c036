import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from valm.errors import ValmError
from valm.training.blocks import Blocks
from valm.training.split import hold_out

DOCUMENTS = [{"input_ids": list(range(number + 1))} for number in range(40)]


@given(st.integers(2, 40), st.floats(0.001, 0.999), st.integers(0, 9))
def test_every_document_is_trained_on_or_held_out(count, fraction, seed):
    kept, held = hold_out(DOCUMENTS[:count], fraction, seed)
    numbers = [
        len(document["input_ids"]) - 1 for part in (kept, held) for document in (part[i] for i in range(len(part)))
    ]
    assert sorted(numbers) == list(range(count))
    assert len(held) == min(count - 1, max(1, round(fraction * count)))
    assert kept.lengths().tolist() == [len(kept[i]["input_ids"]) for i in range(len(kept))]
    assert np.array_equal(hold_out(DOCUMENTS[:count], fraction, seed)[1].numbers, held.numbers)


@pytest.mark.parametrize(
    "count, fraction, message",
    [(9, 0.0, "above 0"), (9, 1.0, "below 1"), (1, 0.5, "at least 2, got 1: give a corpus of more")],
)
def test_what_cannot_be_held_out_is_said(count, fraction, message):
    with pytest.raises(ValmError, match=message):
        hold_out(DOCUMENTS[:count], fraction, 0)


def test_blocks_are_cut_after_the_split():
    with pytest.raises(TypeError, match="got Blocks"):
        hold_out(Blocks(DOCUMENTS, 8, 0), 0.5, 0)
