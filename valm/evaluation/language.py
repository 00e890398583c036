"""How well a model predicts text: perplexity, and the last word of LAMBADA's passages (Paperno et al. 2016).

Every text is read alone and batches hold texts of one length, so no number here depends on padding or batch size
(with the published code the same checkpoint gave 43.4 unpadded and 48.6 padded).
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
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.choice import PROTOCOLS
from valm.evaluation.files import read_json_lines
from valm.evaluation.scoring import Accuracy, check_model, equal_lengths
from valm.model import VaLMForCausalLM

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
    model: VaLMForCausalLM,
    documents: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> Perplexity:
    """Perplexity of `documents` (token ids, as `tokenize_documents` gives them), over all tokens but each first one.

    Raises:
        ValmError: no document has two tokens, or a model that sees pictures was given no retriever.
    """
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise ValmError("there is no document of at least two tokens")
    nats = sum(-float(row.sum()) for row in _log_probs(model, documents, batch_size, progress)[0])
    tokens = sum(len(document) - 1 for document in documents)
    return Perplexity(math.exp(nats / tokens), tokens, nats)


def load_lambada(path: str | os.PathLike) -> list[str]:
    """The passages of a file of lines like {"text": ...}.

    Raises:
        ValmError: the file is missing or has something else in it.
    """
    return [row["text"] for row in read_json_lines(path, {"text"})]


def evaluate_lambada(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    passages: Sequence[str],
    *,
    protocol: str = "fair",
    batch_size: int = 16,
    progress: str | None = None,
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
    start = [tokenizer.bos_token_id] if fair else []
    texts, lengths = [], []
    for passage in passages:
        word = LAST_WORD.search(passage)
        before = passage[: word.start()].rstrip() if word else ""
        ids = tokenizer(passage, add_special_tokens=False)["input_ids"]
        context = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        if not 0 < context < len(ids):
            raise ValmError(f"a passage must end in a word with text before it, got {passage!r}")
        texts.append(start + ids)
        lengths.append(len(ids) - context if fair else 1)
    log_probs, likeliest = _log_probs(model, texts, batch_size, progress)
    known = np.array([bool(row[-n:].all()) for row, n in zip(likeliest, lengths, strict=True)])
    nats = -sum(float(row[-n:].sum()) for row, n in zip(log_probs, lengths, strict=True))
    return LambadaResult(protocol, len(passages), Accuracy.of(known), math.exp(nats / sum(lengths)))


@torch.no_grad()
def _log_probs(
    model: VaLMForCausalLM, texts: Sequence[Sequence[int]], batch_size: int, progress: str | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each text (T,), of every token after the first: its log-probability (T - 1,) float64, and whether none is
    likelier."""
    check_model(model)
    log_probs: list = [None] * len(texts)
    likeliest: list = [None] * len(texts)
    with tqdm(total=len(texts), desc=progress, unit="text", disable=progress is None) as bar:
        for rows in equal_lengths(texts, batch_size):
            ids = torch.tensor([list(texts[row]) for row in rows], device=model.device)  # (b, T)
            scores = model(ids).logits[:, :-1].float().log_softmax(-1)  # (b, T - 1, V)
            of_tokens = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (b, T - 1)
            best = of_tokens == scores.amax(-1)
            for row, values, is_best in zip(rows, of_tokens.double().cpu(), best.cpu(), strict=True):
                log_probs[row], likeliest[row] = values, is_best
            bar.update(len(rows))
    return log_probs, likeliest
