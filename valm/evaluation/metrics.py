"""Turns scores into metrics with intervals, and computes the baselines of constant answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from valm.evaluation.choice import log_prior, vote_of_prompts
from valm.evaluation.questions import FAIR, Documents, Questions
from valm.evaluation.scorers import DocumentScore
from valm.evaluation.size import YES_NO, objects_of
from valm.evaluation.statistics import Estimate, ratio


def choice_metrics(asked: Questions, scores: np.ndarray, alone: np.ndarray | None) -> dict[str, Any]:
    """The numbers of one task.

    Args:
        scores: (seeds, items, prompts, candidates), log-probabilities after the prompts.
        alone: (seeds, candidates), log-probabilities without a prompt, None where there are none.

    Returns:
        accuracy: over all items and prompts. balanced: mean over the answers of the accuracy where each is right.
        In the fair protocol also: calibrated: each score less that of the answer without a prompt. calibrated_mean:
        each probability divided by its mean over the items. vote: of an item's prompts. For pairs instead of it:
        both_orders: right in both, 0 for any constant answer. preferred: "yes" is likelier, against "no", in the right
        order than in the other; chance is .5.
        baselines: majority, its answer, and every constant answer.
    """
    right = np.array(asked.right)  # (items, prompts)
    share = partial(of_prompts, objects=objects_of(asked.items, asked.candidates))
    correct = scores.argmax(-1) == right  # (seeds, items, prompts)
    shares = Counter(right.ravel().tolist())
    constants = {asked.candidates[answer]: count / right.size for answer, count in shares.most_common()}
    found: dict[str, Any] = {
        "accuracy": share(correct),
        "balanced": float(np.mean([correct[:, right == answer].mean() for answer in shares])),
        "baselines": {
            "majority": max(constants.values()),
            "majority_answer": max(constants, key=lambda answer: constants[answer]),
            "chance": 1 / len(asked.candidates),
            "constants": constants,
        },
    }
    if asked.candidates == YES_NO:
        found["said_yes"] = float((scores.argmax(-1) == 0).mean())
    if not asked.fair:
        return found
    if alone is not None:
        found["calibrated"] = share((scores - alone[:, None, None]).argmax(-1) == right)
    if (right == right[:, :1]).all():
        without_prior = np.stack([of_seed - log_prior(of_seed) for of_seed in scores])
        found["calibrated_mean"] = share(without_prior.argmax(-1) == right)
        if right.shape[1] > 1:
            votes = np.stack([vote_of_prompts(of_seed) for of_seed in scores])  # (seeds, items)
            found["vote"] = share((votes == right[:, 0])[..., None])
    else:
        margin = (scores[..., 0] - scores[..., 1]).reshape(*correct.shape[:2], -1, 2)  # (seeds, items, prompts, orders)
        found["both_orders"] = share(correct.reshape(margin.shape).all(-1))
        found["preferred"] = share(margin[..., 0] > margin[..., 1])
    return found


def of_prompts(correct: np.ndarray, objects: np.ndarray | None = None) -> dict[str, float]:
    """The share that is right of (seeds, items, prompts); objects as in `ratio`."""
    tries = np.full(correct.shape[:2], float(correct.shape[2]))
    return asdict(ratio(correct.sum(-1).astype(float), tries, objects=objects))


def document_metrics(asked: Documents, scores: Sequence[Sequence[DocumentScore]]) -> dict[str, Any]:
    """The numbers of one task, of (seeds, texts).

    perplexity: per token of the model's own tokenizer. word_perplexity, byte_perplexity: per word and byte of the text,
    in any vocabulary; a tokenizer that drops case or blanks, as CLIP's does, leaves less to predict. Where there is a
    last word, accuracy: how often it is the likeliest, and target_perplexity: per such word (published: per last
    token).
    """
    nats, tokens, words, bytes_, word_nats, known = (
        np.array([[getattr(score, name) for score in of_seed] for of_seed in scores], dtype=float)
        for name in ("nats", "tokens", "words", "bytes", "word_nats", "known")
    )
    found: dict[str, Any] = {"perplexity": _perplexity(nats, tokens)}
    if asked.protocol == FAIR:
        found |= {"word_perplexity": _perplexity(nats, words), "byte_perplexity": _perplexity(nats, bytes_)}
    if asked.last_word:
        found |= {
            "accuracy": asdict(ratio(known, np.ones_like(known))),
            "target_perplexity": _perplexity(word_nats, np.ones_like(known)),
            "baselines": {"majority": 0.0, "majority_answer": "any one word", "chance": 0.0, "constants": {}},
        }
    return found


def _perplexity(nats: np.ndarray, units: np.ndarray) -> dict[str, float]:
    estimate: Estimate = ratio(nats, units, transform=np.exp)
    return asdict(estimate)
