"""How well a model predicts text: perplexity, and the last word of LAMBADA's passages (Paperno et al. 2016).

Every text is read alone and batches hold texts of one length, so no number here depends on padding or batch size
(with the published code the same checkpoint gave 43.4 unpadded and 48.6 padded). A text longer than the model's context
is read in windows that overlap by half.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.choice import PROTOCOLS
from valm.evaluation.files import read_json_lines
from valm.evaluation.scoring import Accuracy, Progress, check_model, context_length, counting, equal_lengths
from valm.tokenizer import begin_id

# Quotation marks in front of a word are text before it; the apostrophe of "don't" belongs to the word.
LAST_WORD = re.compile(r"\w+(?:['’](?:s|t|re|ve|m|ll|d))?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Perplexity:
    """exp(nats / tokens), per piece of the tokenizer: models with different ones cannot be compared by it."""

    perplexity: float
    tokens: int
    nats: float


@dataclass(frozen=True)
class LambadaResult:
    """accuracy: share of passages whose last word (published: last piece of it) is what the model finds likeliest, with
    its 95 % interval over passages. perplexity: of that word, per piece."""

    protocol: str
    passages: int
    accuracy: Accuracy
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


def perplexity(
    model: Any,
    documents: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    progress: Progress = None,
) -> Perplexity:
    """Perplexity of `documents` (token ids, as `tokenize_documents` gives them), over all tokens but each first one.

    Raises:
        ValmError: no document has two tokens, or a model that sees pictures was given no retriever.
    """
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise ValmError("there is no document of at least two tokens")
    nats = sum(-float(row.sum()) for row in token_log_probs(model, documents, batch_size, progress)[0])
    tokens = sum(len(document) - 1 for document in documents)
    return Perplexity(math.exp(nats / tokens), tokens, nats)


def load_lambada(path: str | os.PathLike) -> list[str]:
    """The passages of a file of lines like {"text": ...}.

    Raises:
        ValmError: the file is missing or has something else in it.
    """
    return [row["text"] for row in read_json_lines(path, {"text"})]


def evaluate_lambada(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    passages: Sequence[str],
    *,
    protocol: str = "fair",
    batch_size: int = 16,
    progress: Progress = None,
) -> LambadaResult:
    """Whether the model knows the last word of each passage, with nothing but the text before it.

    "fair": all pieces of the word must be the likeliest, one after the other, and the text begins with SOT.
    "published": the last piece only, given those before it (12.7 % of the words have several), without SOT.

    Raises:
        ValmError: no passages, one of a single word, or a protocol there is not.
    """
    if protocol not in PROTOCOLS:
        raise ValmError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not passages:
        raise ValmError("there are no passages")
    fair = protocol == "fair"
    start = [begin_id(tokenizer)] if fair else []
    texts, lengths = [], []
    for passage in passages:
        ids, length = last_word(tokenizer, passage)
        texts.append(start + ids)
        lengths.append(length if fair else 1)
    log_probs, likeliest = token_log_probs(model, texts, batch_size, progress)
    known = np.array([bool(row[-n:].all()) for row, n in zip(likeliest, lengths, strict=True)])
    nats = -sum(float(row[-n:].sum()) for row, n in zip(log_probs, lengths, strict=True))
    return LambadaResult(protocol, len(passages), Accuracy.of(known), math.exp(nats / sum(lengths)))


def last_word(tokenizer: PreTrainedTokenizerFast, passage: str) -> tuple[list[int], int]:
    """The tokens of a passage, and of how many its last word is.

    Raises:
        ValmError: it does not end in a word with text before it.
    """
    word = LAST_WORD.search(passage)
    before = passage[: word.start()].rstrip() if word else ""
    ids = tokenizer(passage, add_special_tokens=False)["input_ids"]
    context = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    if not 0 < context < len(ids):
        raise ValmError(f"a passage must end in a word with text before it, got {passage!r}")
    return ids, len(ids) - context


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """How a text of `length` tokens is read by a model that reads `context` at once.

    Returns:
        (start, end, scored) of each window: it reads the tokens start to end and scores those from scored on, which all
        but the first window see at least half a context before.
    """
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
    """For each text (T,), of every token after the first: its log-probability (T - 1,) float64, and whether none is
    likelier. A text longer than the model's context is read in windows.

    Raises:
        ValmError: a model that sees images was given no retriever.
    """
    check_model(model)
    context = context_length(model)
    log_probs = [torch.empty(len(text) - 1, dtype=torch.float64) for text in texts]
    likeliest = [torch.empty(len(text) - 1, dtype=torch.bool) for text in texts]
    places = [(row, *window) for row, text in enumerate(texts) for window in windows(len(text), context)]
    parts = [texts[row][start:end] for row, start, end, _ in places]
    with counting(progress, len(texts)) as advance:
        for rows in equal_lengths(parts, batch_size):
            ids = torch.tensor([list(parts[row]) for row in rows], device=model.device)  # (b, T)
            scores = model(ids).logits[:, :-1].float().log_softmax(-1)  # (b, T - 1, V)
            of_tokens = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (b, T - 1)
            best = of_tokens == scores.amax(-1)
            for part, values, is_best in zip(rows, of_tokens.double().cpu(), best.cpu(), strict=True):
                row, start, end, scored = places[part]
                log_probs[row][scored - 1 : end - 1] = values[scored - start - 1 :]
                likeliest[row][scored - 1 : end - 1] = is_best[scored - start - 1 :]
            advance(len(rows) * len(texts) / len(parts))
    return log_probs, likeliest
