import os
from pathlib import Path

import pytest

from valm.errors import ValmError
from valm.evaluation.size import YES_NO, load_size_pairs, objects_of

DATA = os.environ.get("VALM_EVAL_DATA")


@pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")
def test_the_set_has_486_pairs_of_41_objects():
    pairs = load_size_pairs(Path(DATA) / "eval/object_size/sizePairsFull.txt")
    assert (len(pairs), len({thing for pair in pairs for thing in pair})) == (486, 41)
    assert pairs[0] == ("aeroplane", "apple")


def test_a_line_that_is_no_pair_is_named(tmp_path):
    (tmp_path / "pairs").write_text("bus cat\nbus\n")
    with pytest.raises(ValmError, match="line 2: expected two words, got 1"):
        load_size_pairs(tmp_path / "pairs")


def test_the_objects_of_pairs():
    assert objects_of(["bus > cat", "polar bear > bus"], YES_NO).tolist() == [[0, 1], [2, 0]]
    assert objects_of(["a review > the film"], ("Positive", "Negative")) is None
