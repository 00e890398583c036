"""The colour of everyday things: MemoryColor and ColorTerms with the paper's nine prompts.

Two protocols. "published" does what the published script does, to compare with published numbers; "fair" corrects
what that script gets wrong:

=========================== ============================================ =====================================
                            published                                    fair
=========================== ============================================ =====================================
candidates                  the answers that occur in the file           the same eleven colours for every set
[DESCRIPTOR] of ColorTerms  left in the prompt as it stands              "the"
answers                     one piece each, the others are refused       log-probability summed over pieces
start of the text           no SOT                                       SOT, as in training
one answer per item         -                                            the vote of the prompts
a colour's own frequency    -                                            taken out (the calibrated accuracy)
=========================== ============================================ =====================================
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.scoring import Accuracy, answer_log_probs, answer_pieces
from valm.model import VaLMForCausalLM

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

PROTOCOLS = ("published", "fair")


@dataclass(frozen=True)
class ColorItem:
    """A thing and its colour. The descriptor is what stands before the name ("a", "the inside of a", ""); None where
    the data have none."""

    item: str
    color: str
    descriptor: str | None = None


@dataclass(frozen=True)
class ColorResult:
    """Accuracies with their 95 % intervals over items, and every answer.

    accuracy: over all items and prompts together. vote: over items, each answered by most of its prompts.
    calibrated, calibrated_vote: the same after dividing each colour's probability by its mean over the items, prompt
    by prompt, which takes out how often a colour is said at all (no label is used). None in the published protocol.
    majority: share of the most frequent colour, what always answering majority_color would get.
    predictions: a colour for each item and prompt.
    """

    protocol: str
    prompts: tuple[str, ...]
    candidates: tuple[str, ...]
    items: tuple[ColorItem, ...]
    predictions: tuple[tuple[str, ...], ...]
    accuracy: Accuracy
    vote: Accuracy | None
    calibrated: Accuracy | None
    calibrated_vote: Accuracy | None
    majority: float
    majority_color: str

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


def load_memory_color(path: str | os.PathLike) -> list[ColorItem]:
    """MemoryColor (Norlund et al. 2021): 109 rows of Index,Descriptor,Item,Color.

    Raises:
        ValmError: the file is missing or has other columns.
    """
    rows = _read_csv(path, ["Index", "Descriptor", "Item", "Color"])
    return [ColorItem(row["Item"].strip(), row["Color"].strip(), row["Descriptor"].strip()) for row in rows]


def load_color_terms(path: str | os.PathLike) -> list[ColorItem]:
    """ColorTerms (Bruni et al. 2012): 52 rows of object,color.

    Raises:
        ValmError: the file is missing or has other columns.
    """
    return [ColorItem(row["object"].strip(), row["color"].strip()) for row in _read_csv(path, ["object", "color"])]


def evaluate_color(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[ColorItem],
    *,
    protocol: str = "fair",
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 64,
    progress: str | None = None,
) -> ColorResult:
    """Asks `model` for the colour of each item with each prompt (section 3.2 of the paper).

    A model that sees pictures needs its retriever first (`set_retriever`). Prompts have [ITEM] and may have
    [DESCRIPTOR].

    Raises:
        ValmError: no items, a prompt without [ITEM], an item whose colour is no candidate, or, in the published
            protocol, a colour that is not one piece for this tokenizer.
    """
    if protocol not in PROTOCOLS:
        raise ValmError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    fair = protocol == "fair"
    if not items:
        raise ValmError("there are no items to ask for")
    for prompt in prompts:
        if "[ITEM]" not in prompt:
            raise ValmError(f"prompt {prompt!r} has no [ITEM]")
    candidates = COLORS if fair else tuple(dict.fromkeys(item.color for item in items))
    for item in items:
        if item.color not in candidates:
            raise ValmError(f"the colour of {item.item!r} is {item.color!r}, expected one of {', '.join(candidates)}")
    if not fair:
        for color, pieces in zip(candidates, answer_pieces(tokenizer, candidates), strict=True):
            if len(pieces) != 1:
                raise ValmError(
                    f"{color!r} is {len(pieces)} pieces for this tokenizer, and the published protocol compares single "
                    "pieces: use protocol='fair'"
                )

    texts = [_fill(prompt, item, fair) for item in items for prompt in prompts]
    scores = answer_log_probs(
        model, tokenizer, texts, candidates, bos=fair, batch_size=batch_size, progress=progress
    ).numpy()
    scores = scores.reshape(len(items), len(prompts), len(candidates)).astype(np.float64)
    gold = np.array([candidates.index(item.color) for item in items])  # (items,)
    predicted = scores.argmax(-1)  # (items, prompts)
    vote = calibrated = calibrated_vote = None
    if fair:
        vote = Accuracy.of(_vote(scores) == gold)
        without_prior = scores - _log_prior(scores)
        calibrated = Accuracy.of(without_prior.argmax(-1) == gold[:, None])
        calibrated_vote = Accuracy.of(_vote(without_prior) == gold)
    majority_color, count = Counter(item.color for item in items).most_common(1)[0]
    return ColorResult(
        protocol=protocol,
        prompts=tuple(prompts),
        candidates=candidates,
        items=tuple(items),
        predictions=tuple(tuple(candidates[i] for i in row) for row in predicted),
        accuracy=Accuracy.of(predicted == gold[:, None]),
        vote=vote,
        calibrated=calibrated,
        calibrated_vote=calibrated_vote,
        majority=count / len(items),
        majority_color=majority_color,
    )


def _fill(prompt: str, item: ColorItem, fair: bool) -> str:
    descriptor = item.descriptor
    if descriptor is None:
        descriptor = "the" if fair else "[DESCRIPTOR]"
    return " ".join(prompt.replace("[DESCRIPTOR]", descriptor).replace("[ITEM]", item.item).split())


def _vote(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (items,): what most prompts answer; among equals, what is likelier over all."""
    log_probs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)  # among the candidates
    votes = np.eye(scores.shape[-1])[scores.argmax(-1)].sum(1)  # (items, candidates)
    likely = np.exp(log_probs).mean(1)  # below 1, so it decides between equal votes only
    return (votes + likely).argmax(-1)


def _log_prior(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (1, prompts, candidates): log of each candidate's mean probability over items."""
    log_probs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    return np.logaddexp.reduce(log_probs, axis=0, keepdims=True) - np.log(len(scores))


def _read_csv(path: str | os.PathLike, columns: list[str]) -> list[dict[str, str]]:
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise ValmError(f"{path} has the columns {reader.fieldnames}, expected {columns}")
            return list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValmError(f"cannot read {path}: {error}") from error
