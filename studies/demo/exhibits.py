"""Single questions to show: the pictures found, what the model looks at, its answers when two channels are swapped."""

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
# One thing of each of these colours is shown with its channels swapped: two that should change and one that should not.
SWAPPED_COLORS = ("red", "blue", "grey")


class Example(NamedTuple):
    """A question, explained, and its right answer."""

    seen: Explanation
    truth: str

    @property
    def answer(self) -> str:
        return self.seen.answers[int(self.seen.probabilities.argmax())]


class Swap(NamedTuple):
    """A question, explained with the pictures as they are and with red and blue swapped in them."""

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
    """Asks about things drawn at random from `items`, so that nobody picks those that go well.

    The swap is shown on the first one of each of its colours that is answered rightly with the pictures as they are.
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
