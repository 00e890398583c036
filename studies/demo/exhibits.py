"""Single questions to show: the pictures found, what the model looks at, its answers when two channels are swapped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from transformers import PreTrainedTokenizerFast

from studies.demo.questions import (
    PLAIN_PROMPT,
    answer_probabilities,
    evaluate_color,
    plain_question,
    swap_red_and_blue,
)
from valm.evaluation.controls import Replaced
from valm.evaluation.questions import COLORS
from valm.evaluation.sets import Item
from valm.explain.explanation import Explanation, explain
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.retriever import ImageRetriever, Retriever

NUM_EXAMPLES = 10
# One thing of each of these colours is shown with its channels swapped: two that should change and one that should not.
SWAPPED_COLORS = ("red", "blue", "grey")


@dataclass(frozen=True)
class Example:
    """A question, the pictures that its last token found, what is on them, and the answer."""

    question: str
    pictures: list[Image.Image]
    captions: list[str]
    answer: str
    truth: str


@dataclass(frozen=True)
class Swap:
    """The pictures of one question before and after the swap, and the probabilities of the answers."""

    question: str
    pictures: dict[str, list[Image.Image]]
    probabilities: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Exhibits:
    examples: list[Example]
    attention: Explanation
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
    return Exhibits(
        examples=[_example(model, tokenizer, found, item) for item in drawn[:NUM_EXAMPLES]],
        attention=explain(model, tokenizer, plain_question(drawn[0]), retriever=found),
        swaps=[_swap(model, tokenizer, found, swapped, plain_question(item)) for item in first_right.values()],
    )


def _example(model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, found: Retriever, item: Item) -> Example:
    seen = explain(model, tokenizer, plain_question(item), retriever=found, answers=COLORS)
    return Example(
        seen.text,
        _last_pictures(seen),
        [image.caption for image in seen.images_of(-1)],
        seen.answers[seen.probabilities.argmax()],
        item.answer,
    )


def _swap(
    model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, found: Retriever, swapped: Replaced, question: str
) -> Swap:
    before = _last_pictures(explain(model, tokenizer, question, retriever=found))
    after = [swap_red_and_blue(picture) for picture in before]
    probabilities = {}
    retrievers: dict[str, ImageRetriever] = {"as they are": found, "red and blue swapped": swapped}
    for name, retriever in retrievers.items():
        model.set_retriever(retriever)
        probabilities[name] = answer_probabilities(model, tokenizer, question)
    return Swap(question, dict(zip(probabilities, (before, after), strict=True)), probabilities)


def _last_pictures(seen: Explanation) -> list[Image.Image]:
    """The pictures of the question's last token, best first; the demo's knowledge base has thumbnails of all."""
    return [image.thumbnail for image in seen.images_of(-1) if image.thumbnail is not None]
