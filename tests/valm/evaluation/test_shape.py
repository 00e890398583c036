import os
from collections import Counter
from pathlib import Path

import pytest

from tests.valm.models import tiny_model
from valm.errors import ValmError
from valm.evaluation.shape import PROMPTS, SHAPES, ShapeItem, evaluate_shape, load_shapes
from valm.tokenizer import clip_tokenizer, prune_tokenizer

DATA = os.environ.get("VALM_EVAL_DATA")
TOKENIZER = prune_tokenizer(clip_tokenizer(), [*PROMPTS, *SHAPES])


@pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")
def test_the_set_is_mostly_round():
    items = load_shapes(Path(DATA) / "eval/object_shape/test_shape.jsonl")
    counts = Counter(item.shape for item in items)
    assert (len(items), counts["round"], counts["square"], counts["triangle"]) == (101, 81, 13, 2)
    assert set(counts) == set(SHAPES)


def test_every_item_is_asked_with_every_prompt():
    model = tiny_model(vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id, num_images=0)
    items = [ShapeItem("ball", "round"), ShapeItem("box", "square"), ShapeItem("kite", "rhombus")]
    result = evaluate_shape(model, TOKENIZER, items)
    assert result.candidates == SHAPES
    assert [len(row) for row in result.predictions] == [5, 5, 5]
    assert result.accuracy.value == pytest.approx(
        sum(answer == item.shape for item, row in zip(items, result.predictions, strict=True) for answer in row) / 15
    )
    with pytest.raises(ValmError, match="the answer 'flat' is not one of round"):
        evaluate_shape(model, TOKENIZER, [ShapeItem("plate", "flat")])
