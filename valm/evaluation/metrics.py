"""Turns scores into metrics with intervals, and computes the baselines of constant answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from valm.evaluation.questions import FAIR, YES_NO, Documents, Questions
from valm.evaluation.statistics import accuracy, as_json, ratio


def choice_metrics(asked: Questions, scores: np.ndarray, alone: np.ndarray | None) -> dict[str, Any]:
    """The metrics of a task with candidates.

    Args:
        scores: (seeds, items, prompts, candidates), log-probabilities after the prompts.
        alone: (seeds, candidates), log-probabilities without a prompt; None if there are none.

    Returns:
        accuracy: over all items and prompts. balanced: accuracy of each right answer, averaged over the answers.
        baselines: the majority answer and every constant answer.

        In the fair protocol also accuracies by other scores. calibrated: each score minus the answer's score without a
        prompt. calibrated_mean: each probability divided by its mean over the items. vote: the answer of most prompts
        of an item. For pairs, instead of vote: both_orders: right in both orders (0 for any constant answer);
        preferred: "yes" is likelier than "no" more in the right order than in the other (chance is .5).
    """
    right = np.array(asked.right)  # (items, prompts)
    found: dict[str, Any] = {}

    def share(name: str, correct: np.ndarray) -> None:
        """Adds a metric from `correct`, (seeds, items) or (seeds, items, prompts)."""
        found[name] = as_json(accuracy(correct, asked.objects), len(right))

    given = scores.argmax(-1)
    correct = given == right  # (seeds, items, prompts)
    share("accuracy", correct)
    answers = asked.answers  # (items, prompts)
    shares = Counter(answers.ravel().tolist())
    constants = {answer: count / right.size for answer, count in shares.most_common()}
    found["balanced"] = float(np.mean([correct[:, answers == answer].mean() for answer in shares]))
    found["baselines"] = {
        "majority": max(constants.values()),
        "majority_answer": max(constants, key=lambda answer: constants[answer]),
        "chance": fmean(1 / len(candidates) for candidates in asked.choices or (asked.candidates,)),
        "constants": constants,
    }
    if asked.candidates == YES_NO:
        found["said_yes"] = float((given == 0).mean())
    if not asked.fair or not asked.candidates:
        return found
    if alone is not None:
        share("calibrated", (scores - alone[:, None, None]).argmax(-1) == right)
    if (calibrated := calibrated_right(asked, scores)) is not None:
        share("calibrated_mean", calibrated)
        if right.shape[1] > 1:
            votes = np.stack([vote_of_prompts(of_seed) for of_seed in scores])  # (seeds, items)
            share("vote", votes == right[:, 0])
    else:
        margin = (scores[..., 0] - scores[..., 1]).reshape(*correct.shape[:2], -1, 2)  # (seeds, items, prompts, orders)
        share("both_orders", correct.reshape(margin.shape).all(-1))
        share("preferred", margin[..., 0] > margin[..., 1])
    return found


def document_metrics(asked: Documents, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The metrics of a task of texts, from the results of `Scorer.documents`, stacked: (seeds, texts).

    perplexity: per token of the model's tokenizer. word_perplexity, byte_perplexity: per word and byte of the text, in
    any vocabulary; a tokenizer that drops case or blanks, such as CLIP's, leaves less to predict. For last words,
    accuracy: how often the last word is the likeliest; target_perplexity: per last word (published: per last token).
    """

    items = len(asked.texts)

    def perplexity(nats: np.ndarray, units: np.ndarray) -> dict[str, float | None]:
        return as_json(ratio(nats, units, transform=np.exp), items)

    nats, texts = scores["nats"], np.ones_like(scores["nats"])
    found: dict[str, Any] = {"perplexity": perplexity(nats, scores["tokens"])}
    if asked.protocol == FAIR:
        found["word_perplexity"] = perplexity(nats, scores["words"])
        found["byte_perplexity"] = perplexity(nats, scores["bytes"])
    if asked.last_word:
        found |= {
            "accuracy": as_json(accuracy(scores["known"]), items),
            "target_perplexity": perplexity(scores["word_nats"], texts),
            "baselines": {"majority": 0.0, "majority_answer": "any one word", "chance": 0.0, "constants": {}},
        }
    return found


def calibrated_right(asked: Questions, scores: np.ndarray) -> np.ndarray | None:
    """Whether each answer is right if each probability is divided by its mean over the items: (seeds, items, prompts).

    None in the published protocol, and if candidates differ among the items or the right one among prompts.
    """
    right = np.array(asked.right)
    if not asked.fair or not asked.candidates or (right != right[:, :1]).any():
        return None
    without_prior = np.stack([of_seed - log_prior(of_seed) for of_seed in scores])
    return without_prior.argmax(-1) == right


def vote_of_prompts(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (items,): the answer of most prompts. Ties go to the likeliest answer over all
    prompts."""
    votes = np.eye(scores.shape[-1])[scores.argmax(-1)].sum(1)  # (items, candidates)
    likely = np.exp(_among_candidates(scores)).mean(1)  # below 1, so it only breaks ties
    return (votes + likely).argmax(-1)


def log_prior(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (1, prompts, candidates): log of each candidate's mean probability over items."""
    return np.logaddexp.reduce(_among_candidates(scores), axis=0, keepdims=True) - np.log(len(scores))


def _among_candidates(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities among the candidates: they sum to 1 for each item and prompt."""
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
