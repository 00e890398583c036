"""Questions with a fixed set of answers, asked of every item with several prompts: the part all such sets share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.scoring import Accuracy, Progress, answer_log_probs, answer_pieces

PROTOCOLS = ("published", "fair")


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracies with their 95 % intervals over items, and every answer.

    accuracy: over all items and prompts together. vote: over items, each answered by most of its prompts.
    calibrated, calibrated_vote: the same after dividing each answer's probability by its mean over the items, prompt
    by prompt, which takes out how often a word is said at all (no label is used). None in the published protocol.
    majority: share of the most frequent answer, what always answering majority_answer would get.
    balanced: mean over the answers of the accuracy among the items that have it: always saying one word gets
    1 / number of answers, however the set is made up.
    predictions: an answer for each item and prompt.
    """

    protocol: str
    prompts: tuple[str, ...]
    candidates: tuple[str, ...]
    items: tuple[Any, ...]
    predictions: tuple[tuple[str, ...], ...]
    accuracy: Accuracy
    balanced: float
    vote: Accuracy | None
    calibrated: Accuracy | None
    calibrated_vote: Accuracy | None
    majority: float
    majority_answer: str

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


def check_protocol(protocol: str, items: Sequence, prompts: Sequence[str]) -> None:
    """Raises ValmError for a protocol there is not, no items, no prompts, or a prompt without [ITEM]."""
    if protocol not in PROTOCOLS:
        raise ValmError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not items or not prompts:
        raise ValmError(f"there are no {'prompts' if items else 'items'} to ask with")
    for prompt in prompts:
        if "[ITEM]" not in prompt:
            raise ValmError(f"prompt {prompt!r} has no [ITEM]")


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[Sequence[str]],
    right: Sequence[str],
    candidates: Sequence[str],
    *,
    fair: bool,
    batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Scores every candidate after every text: the fields of a `ChoiceResult` that come out of it.

    Args:
        texts: (items, prompts), the filled-in prompts.
        right: (items,), the right answers.
        fair: SOT first, and answers of several pieces; otherwise neither, as in the published scripts.

    Raises:
        ValmError: a right answer is no candidate, or not fair and a candidate is not one piece.
    """
    for answer in right:
        if answer not in candidates:
            raise ValmError(f"the answer {answer!r} is not one of {', '.join(candidates)}")
    if not fair:
        check_single_tokens(tokenizer, candidates)
    flat = [text for row in texts for text in row]
    scores = answer_log_probs(
        model, tokenizer, flat, candidates, bos=fair, batch_size=batch_size, progress=progress
    ).numpy()
    scores = scores.reshape(len(texts), -1, len(candidates)).astype(np.float64)  # (items, prompts, candidates)
    gold = np.array([candidates.index(answer) for answer in right])  # (items,)
    predicted = scores.argmax(-1)  # (items, prompts)
    correct = predicted == gold[:, None]
    vote = calibrated = calibrated_vote = None
    if fair:
        vote = Accuracy.of(vote_of_prompts(scores) == gold)
        without_prior = scores - log_prior(scores)
        calibrated = Accuracy.of(without_prior.argmax(-1) == gold[:, None])
        calibrated_vote = Accuracy.of(vote_of_prompts(without_prior) == gold)
    majority_answer, count = Counter(right).most_common(1)[0]
    return {
        "candidates": tuple(candidates),
        "predictions": tuple(tuple(candidates[i] for i in row) for row in predicted),
        "accuracy": Accuracy.of(correct),
        "balanced": float(np.mean([correct[gold == answer].mean() for answer in np.unique(gold)])),
        "vote": vote,
        "calibrated": calibrated,
        "calibrated_vote": calibrated_vote,
        "majority": count / len(right),
        "majority_answer": majority_answer,
    }


def check_single_tokens(tokenizer: PreTrainedTokenizerFast, candidates: Sequence[str]) -> None:
    """Raises ValmError for an answer that is not one token, as the published scripts need it."""
    for answer, tokens in zip(candidates, answer_pieces(tokenizer, candidates), strict=True):
        if len(tokens) != 1:
            raise ValmError(
                f"{answer!r} is {len(tokens)} tokens for this tokenizer, and the published protocol compares "
                "single tokens: use protocol='fair'"
            )


def vote_of_prompts(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (items,): what most prompts answer; among equals, what is likelier over all."""
    votes = np.eye(scores.shape[-1])[scores.argmax(-1)].sum(1)  # (items, candidates)
    likely = np.exp(_among_candidates(scores)).mean(1)  # below 1, so it decides between equal votes only
    return (votes + likely).argmax(-1)


def log_prior(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (1, prompts, candidates): log of each candidate's mean probability over items."""
    return np.logaddexp.reduce(_among_candidates(scores), axis=0, keepdims=True) - np.log(len(scores))


def _among_candidates(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities among the candidates: they sum to 1 for each item and prompt."""
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
