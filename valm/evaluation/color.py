"""The color of everyday things: MemoryColor and ColorTerms with the paper's nine prompts.

`valm eval` asks in two protocols. "published" does what the published script does, to compare with published numbers;
"fair", which `evaluate_color` follows, corrects what that script gets wrong:

=========================== ============================================ =====================================
                            published                                    fair
=========================== ============================================ =====================================
candidates                  the answers that occur in the file           the same eleven colours for every set
[DESCRIPTOR] of ColorTerms  left in the prompt as it stands              "the"
answers                     one token each, the others are refused       log-probability summed over tokens
start of the text           no SOT                                       SOT, as in training
one answer per item         -                                            the vote of the prompts
a color's own frequency     -                                            taken out (the calibrated accuracy)
=========================== ============================================ =====================================
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.choice import log_prior, vote_of_prompts
from valm.evaluation.files import read_csv
from valm.evaluation.scoring import Progress, answer_log_probs
from valm.evaluation.statistics import Estimate, accuracy

PROMPTS = (
    "Q: What is the color of [DESCRIPTOR] [ITEM]? A: It is",
    "What is the color of [DESCRIPTOR] [ITEM]? It is",
    "What is the usual color of [DESCRIPTOR] [ITEM]?",
    "What is the typical color of [DESCRIPTOR] [ITEM]?",
    "The color of [DESCRIPTOR] [ITEM] is",
    "The usual color of [DESCRIPTOR] [ITEM] is",
    "The common color of [DESCRIPTOR] [ITEM] is",
    "The typical color of [DESCRIPTOR] [ITEM] is",
    "[DESCRIPTOR] [ITEM] usually has the color of",
)

COLORS = ("white", "yellow", "green", "red", "grey", "brown", "black", "blue", "purple", "pink", "orange")


@dataclass(frozen=True)
class ColorItem:
    """A thing and its colour. The descriptor precedes the name ("a", "the inside of a", ""); None if the data have
    none."""

    item: str
    color: str
    descriptor: str | None = None


@dataclass(frozen=True)
class ColorResult:
    """Accuracies with their 95 % intervals over items, and every answer.

    Attributes:
        accuracy: over all items and prompts together.
        vote: over items, by the vote of their prompts.
        calibrated, calibrated_vote: the same after dividing each answer's probability by its mean over the items,
            separately for each prompt, which removes the frequency of a word (no label is used).
        majority: share of the most frequent answer, the accuracy of always answering majority_answer.
        balanced: mean over the answers of the accuracy on their items; 1 / number of answers for any constant answer.
        predictions: (items, prompts).
    """

    prompts: tuple[str, ...]
    items: tuple[ColorItem, ...]
    predictions: tuple[tuple[str, ...], ...]
    accuracy: Estimate
    balanced: float
    vote: Estimate
    calibrated: Estimate
    calibrated_vote: Estimate
    majority: float
    majority_answer: str

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


def load_memory_color(path: str | os.PathLike) -> list[ColorItem]:
    """MemoryColor (Norlund et al. 2021): 109 rows of Index,Descriptor,Item,Color.

    Raises:
        ValmError: the file has other columns.
    """
    rows = read_csv(path, ["Index", "Descriptor", "Item", "Color"])
    return [ColorItem(row["Item"], row["Color"], row["Descriptor"]) for row in rows]


def load_color_terms(path: str | os.PathLike) -> list[ColorItem]:
    """ColorTerms (Bruni et al. 2012): 52 rows of object,color.

    Raises:
        ValmError: the file has other columns.
    """
    return [ColorItem(row["object"], row["color"]) for row in read_csv(path, ["object", "color"])]


def evaluate_color(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[ColorItem],
    *,
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 64,
    progress: Progress = None,
) -> ColorResult:
    """Asks `model` for the color of each item with each prompt (section 3.2 of the paper), in the fair protocol.

    Args:
        model: one that sees images needs its retriever first (`set_retriever`).
        prompts: with [ITEM], and [DESCRIPTOR] if wanted.

    Raises:
        ValmError: no items, no prompts, a prompt without [ITEM], or an item whose color is none of `COLORS`.
    """
    check_prompts(items, prompts)
    colors = [item.color for item in items]
    texts = [fill(prompt, item.item, item.descriptor, fair=True) for item in items for prompt in prompts]
    flat = answer_log_probs(model, tokenizer, texts, COLORS, batch_size=batch_size, progress=progress).numpy()
    scores = flat.reshape(len(items), len(prompts), len(COLORS)).astype(np.float64)
    right = np.array([COLORS.index(color) for color in colors])  # (items,)
    predicted = scores.argmax(-1)  # (items, prompts)
    correct = predicted == right[:, None]
    without_prior = scores - log_prior(scores)
    majority_answer, count = Counter(colors).most_common(1)[0]
    return ColorResult(
        prompts=tuple(prompts),
        items=tuple(items),
        predictions=tuple(tuple(COLORS[i] for i in row) for row in predicted),
        accuracy=accuracy(correct),
        balanced=float(np.mean([correct[right == answer].mean() for answer in np.unique(right)])),
        vote=accuracy(vote_of_prompts(scores) == right),
        calibrated=accuracy(without_prior.argmax(-1) == right[:, None]),
        calibrated_vote=accuracy(vote_of_prompts(without_prior) == right),
        majority=count / len(items),
        majority_answer=majority_answer,
    )


def check_prompts(items: Sequence[ColorItem], prompts: Sequence[str]) -> None:
    """Checks items and prompts.

    Raises:
        ValmError: there are no items or prompts, a prompt lacks [ITEM], or a color is no candidate.
    """
    if not items or not prompts:
        raise ValmError(f"there are no {'prompts' if items else 'items'} to ask with")
    for prompt in prompts:
        if "[ITEM]" not in prompt:
            raise ValmError(f"prompt {prompt!r} has no [ITEM]")
    for item in items:
        if item.color not in COLORS:
            raise ValmError(f"the answer {item.color!r} is not one of {', '.join(COLORS)}")


def fill(prompt: str, item: str, descriptor: str | None, fair: bool) -> str:
    """The prompt about `item`. Without a descriptor in the data, the published prompts say [DESCRIPTOR]."""
    if descriptor is None:
        descriptor = "the" if fair else "[DESCRIPTOR]"
    return " ".join(prompt.replace("[DESCRIPTOR]", descriptor).replace("[ITEM]", item).split())
