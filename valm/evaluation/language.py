"""How well a model predicts text: each token, and the last word of LAMBADA's passages (Paperno et al. 2016).

A batch contains texts of one length, so no number depends on padding or batch size (with the published code, one
checkpoint scored 43.4 unpadded and 48.6 padded). A text longer than the model's context is read in windows that overlap
by half.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.scoring import Progress, check_model, context_length, equal_lengths
from valm_kernels.json_files import short

# Quotation marks before a word do not belong to it; the apostrophe of "don't" does.
LAST_WORD = re.compile(r"\w+(?:['’](?:s|t|re|ve|m|ll|d))?\s*$", re.IGNORECASE)
NO_LAST_WORD = "a passage must end in a word with text before it"


def last_word(tokenizer: PreTrainedTokenizerFast, passage: str) -> tuple[list[int], int]:
    """The tokens of a passage, and how many of them are its last word. Raises ValmError if the passage does not end in
    a word with text before it."""
    ids = tokenizer(passage, add_special_tokens=False)["input_ids"]
    before = before_last_word(passage)
    context = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    if not 0 < context < len(ids):
        raise ValmError(f"{NO_LAST_WORD}, got {short(passage)}")
    return ids, len(ids) - context


def before_last_word(passage: str) -> str:
    """The text before the last word of a passage; empty if it does not end in a word."""
    word = LAST_WORD.search(passage)
    return passage[: word.start()].rstrip() if word else ""


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """The windows in which a model of `context` tokens reads a text of `length` tokens.

    Returns:
        (start, end, scored) of each window: it reads the tokens from start to end and scores the tokens from `scored`
        on. After the first window, a scored token sees at least half a context.

    Raises:
        ValmError: the context is below 2 tokens.
    """
    if context < 2:
        raise ValmError(
            f"a model must read at least 2 tokens at once to score one by another, but this model reads {context}"
        )
    found = [(0, min(length, context), 1)]
    while found[-1][1] < length:
        scored = found[-1][1]
        end = min(length, scored + context // 2)
        found.append((end - context, end, scored))
    return found


@torch.no_grad()
def token_log_probs(
    model: Any, texts: Sequence[Sequence[int]], batch_size: int, progress: Progress = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each text (T,) and each token after the first: the log-probability (T - 1,) float64, and whether no token is
    likelier. A text longer than the model's context is read in windows. Raises ValmError if the model sees images but
    has no retriever."""
    check_model(model)
    context = context_length(model)
    log_probs = [torch.empty(len(text) - 1, dtype=torch.float64) for text in texts]
    likeliest = [torch.empty(len(text) - 1, dtype=torch.bool) for text in texts]
    places = [(row, *window) for row, text in enumerate(texts) for window in windows(len(text), context)]
    parts = [texts[row][start:end] for row, start, end, _ in places]
    for rows in equal_lengths(parts, batch_size):
        ids = torch.tensor([list(parts[row]) for row in rows], device=model.device)  # (b, T)
        scores = model(ids).logits[:, :-1].float().log_softmax(-1)  # (b, T - 1, V)
        of_tokens = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (b, T - 1)
        best = of_tokens == scores.amax(-1)
        for part, values, is_best in zip(rows, of_tokens.double().cpu(), best.cpu(), strict=True):
            row, start, end, scored = places[part]
            log_probs[row][scored - 1 : end - 1] = values[scored - start - 1 :]
            likeliest[row][scored - 1 : end - 1] = is_best[scored - start - 1 :]
        if progress:
            progress(len(rows) * len(texts) / len(parts))
    return log_probs, likeliest
