"""The shape of things: ViComTe's single-answer shape test (Zhang et al. 2022), 101 things.

The published code has neither data nor script for the paper's ObjectShape; its numbers fit Blind-VaLM's five prompts on
these 101 things, so `valm eval` asks them in its published protocol too. 81 of them are round: always saying "round"
scores 80.2 %, above every published number. Look at the balanced accuracy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from valm.evaluation.choice import ChoiceResult, ask, check_protocol
from valm.evaluation.files import read_json_lines
from valm.model import VaLMForCausalLM

PROMPTS = (
    "[ITEM] can be shape",
    "[ITEM] has shape",
    "[ITEM] is of shape",
    "The shape of [ITEM] can be",
    "The shape of the [ITEM] is",
)

SHAPES = ("round", "square", "triangle", "polygon", "oval", "star", "rhombus", "heart")


@dataclass(frozen=True)
class ShapeItem:
    """A thing and its shape."""

    item: str
    shape: str


@dataclass(frozen=True)
class ShapeResult(ChoiceResult):
    """A `ChoiceResult` whose answers are shapes."""

    items: tuple[ShapeItem, ...]


def load_shapes(path: str | os.PathLike) -> list[ShapeItem]:
    """A file of lines like {"sub": "table top", "obj": "round"}.

    Raises:
        ValmError: the file is missing or has something else in it.
    """
    return [ShapeItem(row["sub"], row["obj"]) for row in read_json_lines(path, {"sub", "obj"})]


def evaluate_shape(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[ShapeItem],
    *,
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 64,
    progress: str | None = None,
) -> ShapeResult:
    """Asks `model` for the shape of each item with each prompt, among `SHAPES`.

    Raises:
        ValmError: no items or prompts, a prompt without [ITEM], or an item whose shape is none of `SHAPES`.
    """
    check_protocol("fair", items, prompts)
    asked = ask(
        model,
        tokenizer,
        [[prompt.replace("[ITEM]", item.item) for prompt in prompts] for item in items],
        [item.shape for item in items],
        SHAPES,
        fair=True,
        batch_size=batch_size,
        progress=progress,
    )
    return ShapeResult(protocol="fair", prompts=tuple(prompts), items=tuple(items), **asked)
