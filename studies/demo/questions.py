"""The questions for the trained models, and pictures with red and blue exchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip
from valm.evaluation.metrics import choice_metrics
from valm.evaluation.questions import COLOR_PROMPTS, COLORS, FAIR, Questions, build, fill
from valm.evaluation.scorers import CausalScorer
from valm.evaluation.sets import SETS, Item
from valm.evaluation.statistics import accuracy
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

# The prompt of the paper that the hit rates, the swap of channels and the figures use.
PLAIN_PROMPT = "The color of [DESCRIPTOR] [ITEM] is"
HITS_AT = (1, 4, 8)


def swapped_red_and_blue(kb: ImageKnowledgeBase, pictures: Path, clip: Clip, batch_size: int = 256) -> torch.Tensor:
    """(N, E): the vector of each picture after its red and blue channels are exchanged."""
    vectors = []
    for start in range(0, len(kb), batch_size):
        files = [pictures / kb.item(i).uri for i in range(start, min(start + batch_size, len(kb)))]
        vectors.append(clip.encode_images([swap_red_and_blue(Image.open(file).convert("RGB")) for file in files]))
    return torch.cat(vectors)


def swap_red_and_blue(picture: Image.Image) -> Image.Image:
    """The picture (RGB or RGBA) with red and blue exchanged."""
    red, green, blue, *alpha = picture.split()
    return Image.merge(picture.mode, (blue, green, red, *alpha))


def plain_question(item: Item) -> str:
    return fill(PLAIN_PROMPT, item.text, item.descriptor, fair=True)


def hit_rates(
    encoder: ContextEncoder, kb: ImageKnowledgeBase, items: Sequence[Item], names: Sequence[str]
) -> dict[str, float]:
    """How often an object's own picture is among the first 1, 4 and 8 pictures for the last token of its question.

    Args:
        names: the name of the object on each picture of the knowledge base.
    """
    retriever = Retriever(encoder, kb, min(max(HITS_AT), len(kb)))
    own = []
    for item in items:
        tokens = encoder.clip.tokenizer(plain_question(item), return_tensors="pt")["input_ids"]  # (1, T), with SOT
        found, _ = retriever.nearest(encoder(tokens)[:, -1])
        own.append([names[id] == item.text for id in found[0].tolist()])
    return {f"top{k}": round(float(np.array(own)[:, :k].any(1).mean()), 4) for k in HITS_AT}


@dataclass(frozen=True)
class ColorResult:
    """predictions: (items, prompts). metrics: of `choice_metrics`."""

    items: tuple[Item, ...]
    prompts: tuple[str, ...]
    predictions: tuple[tuple[str, ...], ...]
    metrics: dict[str, Any]


def evaluate_color(
    model: Any, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item], prompts: Sequence[str] = COLOR_PROMPTS
) -> ColorResult:
    """Asks `model` for the colour of each item with each prompt, in the fair protocol of `valm eval`."""
    asked = build(replace(SETS["memory_color"], prompts=tuple(prompts)), list(items), FAIR)
    assert isinstance(asked, Questions)
    scores = CausalScorer(model, tokenizer, "").answers(asked)[0].double().numpy()  # (items, prompts, colours)
    predictions = tuple(tuple(COLORS[answer] for answer in row) for row in scores.argmax(-1))
    return ColorResult(tuple(items), tuple(prompts), predictions, choice_metrics(asked, scores[None], None))


def accuracies(result: ColorResult) -> dict[str, Any]:
    """The numbers of one evaluation for results.json."""
    gold = np.array([item.answer for item in result.items])
    right = np.array(result.predictions) == gold[:, None]  # (items, prompts)
    found = accuracy(right[None])
    return {
        "accuracy": round(found.value, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "vote": round(result.metrics["vote"]["value"], 4),
        "by_prompt": {
            prompt: round(float(share), 4) for prompt, share in zip(result.prompts, right.mean(0), strict=True)
        },
    }


def answers_by_color(
    model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> dict[str, dict[str, int]]:
    """For the objects of each colour, how often the model answers each colour to the plain question."""
    result = evaluate_color(model, tokenizer, items, prompts=[PLAIN_PROMPT])
    counts: dict[str, Counter] = {}
    for item, (answer,) in zip(items, result.predictions, strict=True):
        counts.setdefault(item.answer, Counter())[answer] += 1
    return {color: dict(counts[color].most_common()) for color in COLORS if color in counts}
