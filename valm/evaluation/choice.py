"""Questions with a fixed set of answers, asked of every item with several prompts: common code of such sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.scoring import answer_tokens


def check_single_tokens(tokenizer: PreTrainedTokenizerFast, candidates: Sequence[str]) -> None:
    """Checks that every answer is one token, as the published scripts need.

    Raises:
        ValmError: an answer is not one token.
    """
    for answer, tokens in zip(candidates, answer_tokens(tokenizer, candidates), strict=True):
        if len(tokens) != 1:
            raise ValmError(
                f"{answer!r} is {len(tokens)} tokens for this tokenizer, and the published protocol compares "
                "single tokens: use the fair one"
            )


def vote_of_prompts(scores: np.ndarray) -> np.ndarray:
    """(items, prompts, candidates) -> (items,): the answer of most prompts; ties go to the likeliest over all
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
