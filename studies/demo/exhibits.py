"""Single questions for the report: the retrieved pictures, the attention, and the answers after a swap of channels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from studies.demo.questions import PLAIN_PROMPT, evaluate_color, plain_question, swap_red_and_blue
from valm.evaluation.controls import Replaced
from valm.evaluation.questions import COLORS
from valm.evaluation.sets import Item
from valm.explain.explanation import Explanation, explain
from valm.explain.images import ShownImage
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.retriever import Retriever

NUM_EXAMPLES = 10
# The report swaps red and blue for one object of each of these colours: two answers should change, one should not.
SWAPPED_COLORS = ("red", "blue", "grey")


class Example(NamedTuple):
    """An explained question and its correct answer."""

    seen: Explanation
    truth: str

    @property
    def answer(self) -> str:
        return self.seen.answers[int(self.seen.probabilities.argmax())]


class Swap(NamedTuple):
    """A question, explained with the original pictures and with red and blue swapped in the pictures."""

    before: Explanation
    after: Explanation


class Exhibits(NamedTuple):
    examples: list[Example]
    swaps: list[Swap]


def collect_exhibits(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    found: Retriever,
    swapped: Replaced,
    items: Sequence[Item],
    seed: int,
) -> Exhibits:
    """Asks about a random sample of `items`, so that nobody picks the successes.

    For each of SWAPPED_COLORS, the swap uses the first item that the model answers correctly before the swap.
    """
    drawn = random.Random(seed).sample(list(items), len(items))
    model.set_retriever(found)
    answers = evaluate_color(model, tokenizer, drawn, prompts=[PLAIN_PROMPT]).predictions
    first_right: dict[str, Item] = {}
    for item, (answer,) in zip(drawn, answers, strict=True):
        if answer == item.answer in SWAPPED_COLORS:
            first_right.setdefault(answer, item)

    def seen(item: Item, retriever: Retriever | Replaced) -> Explanation:
        return explain(model, tokenizer, plain_question(item), retriever=retriever, answers=COLORS)

    def swap(item: Item) -> Swap:
        before = seen(item, found)
        images = tuple(map(_swapped, before.images))
        return Swap(before, replace(seen(item, swapped), images=images, image_index=before.image_index))

    return Exhibits(
        [Example(seen(item, found), item.answer) for item in drawn[:NUM_EXAMPLES]],
        [swap(item) for item in first_right.values()],
    )


def _swapped(image: ShownImage) -> ShownImage:
    return replace(image, thumbnail=None if image.thumbnail is None else swap_red_and_blue(image.thumbnail))
