"""Single questions to show: the pictures found, what the model looks at, its answers when two channels are swapped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from valm.demo.questions import (
    PLAIN_PROMPT,
    answer_probabilities,
    plain_question,
    swap_red_and_blue,
    token_ids,
)
from valm.evaluation.color import ColorItem, evaluate_color
from valm.evaluation.controls import Replaced
from valm.model import VaLMForCausalLM
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
class Attention:
    """The fusion block's weights over one text, the mean over its heads."""

    tokens: list[str]
    text_weights: np.ndarray  # (T, T)
    image_weights: np.ndarray  # (T, K)
    pictures: list[list[Image.Image | None]]  # T rows of K


@dataclass(frozen=True)
class Swap:
    """The pictures of one question before and after the swap, and the probabilities of the answers."""

    question: str
    pictures: dict[str, list[Image.Image]]
    probabilities: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Exhibits:
    examples: list[Example]
    attention: Attention
    swaps: list[Swap]


def collect_exhibits(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    found: Retriever,
    swapped: Replaced,
    items: Sequence[ColorItem],
    seed: int,
) -> Exhibits:
    """Asks about things drawn at random from `items`, so that nobody picks those that go well.

    The swap is shown on the first one of each of its colours that is answered rightly with the pictures as they are.
    """
    drawn = random.Random(seed).sample(list(items), len(items))
    model.set_retriever(found)
    answers = evaluate_color(model, tokenizer, drawn, prompts=[PLAIN_PROMPT]).predictions
    first_right: dict[str, ColorItem] = {}
    for item, (answer,) in zip(drawn, answers, strict=True):
        if answer == item.color in SWAPPED_COLORS:
            first_right.setdefault(answer, item)
    return Exhibits(
        examples=[_example(model, tokenizer, found, item) for item in drawn[:NUM_EXAMPLES]],
        attention=_attention(model, tokenizer, found, plain_question(drawn[0])),
        swaps=[_swap(model, tokenizer, found, swapped, plain_question(item)) for item in first_right.values()],
    )


def _example(model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, found: Retriever, item: ColorItem) -> Example:
    question = plain_question(item)
    probabilities = answer_probabilities(model, tokenizer, question)
    ids = _last_pictures(tokenizer, found, question)
    return Example(
        question,
        _thumbnails(found, ids),
        [found.kb.item(id).caption for id in ids],
        max(probabilities, key=lambda color: probabilities[color]),
        item.color,
    )


def _attention(
    model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, found: Retriever, question: str
) -> Attention:
    ids = token_ids(tokenizer, question)
    pictures = found(ids)
    text, image = model.fusion_attention(ids, pictures.image_pool, pictures.image_index)
    slots = pictures.image_index[0].tolist()  # T rows of K
    return Attention(
        ["SOT", *(str(tokenizer.decode([id])).strip() for id in ids[0, 1:].tolist())],
        text[0].mean(0).numpy(),
        image[0].mean(0).numpy(),
        [[found.kb.thumbnail(int(pictures.image_ids[i])) if i >= 0 else None for i in row] for row in slots],
    )


def _swap(
    model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, found: Retriever, swapped: Replaced, question: str
) -> Swap:
    before = _thumbnails(found, _last_pictures(tokenizer, found, question))
    after = [swap_red_and_blue(picture) for picture in before]
    probabilities = {}
    retrievers: dict[str, ImageRetriever] = {"as they are": found, "red and blue swapped": swapped}
    for name, retriever in retrievers.items():
        model.set_retriever(retriever)
        probabilities[name] = answer_probabilities(model, tokenizer, question)
    return Swap(question, dict(zip(probabilities, (before, after), strict=True)), probabilities)


def _thumbnails(found: Retriever, ids: Sequence[int]) -> list[Image.Image]:
    """The small pictures of `ids`, all of which the demo's knowledge base has."""
    return [picture for id in ids if (picture := found.kb.thumbnail(id)) is not None]


def _last_pictures(tokenizer: PreTrainedTokenizerFast, found: Retriever, question: str) -> list[int]:
    """Ids of the pictures that the last token of the question found, best first."""
    pictures = found(token_ids(tokenizer, question))
    return [int(pictures.image_ids[i]) for i in pictures.image_index[0, -1].tolist() if i >= 0]
