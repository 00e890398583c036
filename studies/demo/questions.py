"""What the trained models are asked, and the pictures with their red and blue channels exchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip
from valm.evaluation.color import COLORS, ColorItem, ColorResult, evaluate_color, fill
from valm.evaluation.scoring import answer_log_probs
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

# The one of the paper's prompts that the hit rates, the swap of the channels and the figures ask with.
PLAIN_PROMPT = "The color of [DESCRIPTOR] [ITEM] is"
HITS_AT = (1, 4, 8)


def swapped_red_and_blue(kb: ImageKnowledgeBase, pictures: Path, clip: Clip, batch_size: int = 256) -> torch.Tensor:
    """(N, E): for each picture the vector of the same picture with its red and blue channels exchanged."""
    vectors = []
    for start in range(0, len(kb), batch_size):
        batch = range(start, min(start + batch_size, len(kb)))
        vectors.append(clip.encode_images([swap_red_and_blue(Image.open(pictures / kb.item(i).uri)) for i in batch]))
    return torch.cat(vectors)


def swap_red_and_blue(picture: Image.Image) -> Image.Image:
    red, green, blue = picture.convert("RGB").split()
    return Image.merge("RGB", (blue, green, red))


def plain_question(item: ColorItem) -> str:
    return fill(PLAIN_PROMPT, item.item, item.descriptor, fair=True)


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """SOT and the tokens of one text, (1, T) int64."""
    return tokenizer(text, return_tensors="pt")["input_ids"]


def hit_rates(
    encoder: ContextEncoder, kb: ImageKnowledgeBase, items: Sequence[ColorItem], names: Sequence[str]
) -> dict[str, float]:
    """How often a thing's own picture is among the first 1, 4 and 8 that the last token of its question finds.

    Args:
        names: the name of the thing on each picture of the knowledge base.
    """
    retriever = Retriever(encoder, kb, min(max(HITS_AT), len(kb)))
    own = []
    for item in items:
        query = encoder(token_ids(encoder.clip.tokenizer, plain_question(item)))[:, -1]  # (1, E)
        ids, _ = retriever.nearest(query)
        own.append([names[id] == item.item for id in ids[0].tolist()])
    found = np.array(own)  # (items, pictures)
    return {f"top{k}": round(float(found[:, :k].any(1).mean()), 4) for k in HITS_AT}


def accuracies(result: ColorResult) -> dict[str, Any]:
    """The numbers of one evaluation for results.json."""
    gold = np.array([item.color for item in result.items])
    right = np.array(result.predictions) == gold[:, None]  # (items, prompts)
    return {
        "accuracy": round(result.accuracy.value, 4),
        "interval": [round(result.accuracy.low, 4), round(result.accuracy.high, 4)],
        "vote": round(result.vote.value, 4),
        "by_prompt": {
            prompt: round(float(share), 4) for prompt, share in zip(result.prompts, right.mean(0), strict=True)
        },
    }


def answers_by_color(
    model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[ColorItem]
) -> dict[str, dict[str, int]]:
    """For the things of each colour, how often each colour is answered to the plain question."""
    result = evaluate_color(model, tokenizer, items, prompts=[PLAIN_PROMPT])
    counts: dict[str, Counter] = {}
    for item, (answer,) in zip(items, result.predictions, strict=True):
        counts.setdefault(item.color, Counter())[answer] += 1
    return {color: dict(counts[color].most_common()) for color in COLORS if color in counts}


def answer_probabilities(model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> dict[str, float]:
    """The probability of each colour word among the colour words."""
    log_probs = answer_log_probs(model, tokenizer, [question], COLORS)[0]
    return dict(zip(COLORS, log_probs.softmax(-1).tolist(), strict=True))
