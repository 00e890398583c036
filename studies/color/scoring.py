"""The answers of one seed's models, item by item; all numbers and figures of a study are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from valm.clip.tokenizer import begin_id
from valm.evaluation.metrics import log_prior
from valm.evaluation.questions import FAIR, Documents, Questions
from valm.evaluation.scorers import CausalScorer
from valm.evaluation.scoring import Progress, answer_tokens
from valm.training.cache_below import FUSION_INPUT, cache_below, fusion_input

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def compact(answers: np.ndarray) -> list[str]:
    """Candidate numbers (items, prompts) as one string per item, with a digit (0-9, a-z) per prompt."""
    return ["".join(DIGITS[answer] for answer in row) for row in answers]


def expanded(answers: Sequence[str]) -> np.ndarray:
    """The inverse of `compact`."""
    return np.array([[DIGITS.index(digit) for digit in row] for row in answers])


def answers_of(scorer: CausalScorer, asked: Questions, progress: Progress = None) -> dict[str, Any]:
    """The most probable candidate for each item and prompt.

    Returns:
        `raw`, and if each item has one right answer for all prompts, `calibrated`: each candidate's probability divided
        by its mean over the items. Both are `compact`.
    """
    scores = scorer.answers(asked, progress)[0].double().numpy()  # (items, prompts, candidates)
    found = {"raw": compact(scores.argmax(-1))}
    right = np.array(asked.right)
    if (right == right[:, :1]).all():
        found["calibrated"] = compact((scores - log_prior(scores)).argmax(-1))
    return found


def predicted(scorer: CausalScorer, texts: Sequence[str], progress: Progress = None) -> dict[str, Any]:
    """The negative log-probability of each text in nats, and its number of tokens."""
    found = scorer.documents(Documents("heldout", FAIR, tuple(texts), last_word=False), progress)
    return {"nats": [round(nats, 4) for nats in found["nats"].tolist()], "tokens": found["tokens"].astype(int).tolist()}


def question_rows(tokenizer: Any, asked: Questions) -> list[list[int]]:
    """The distinct token sequences that a model reads to answer."""
    begin = begin_id(tokenizer)
    heads = {tuple(ids[:-1]) for ids in answer_tokens(tokenizer, asked.candidates)}
    texts = [text for row in asked.texts for text in row]
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [list(row) for row in dict.fromkeys((begin, *ids, *head) for ids in read for head in sorted(heads))]


def text_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, as a model reads them to predict it."""
    return [[begin_id(tokenizer), *ids] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def read_from_fusion(
    model: Any, rows: Iterable[Sequence[int]], folder: Path, *, layer: int | None = None, progress: bool = True
) -> None:
    """Makes `model` start at its fusion layer, or at `layer`, for batches of token sequences in `rows`.

    The layers below are the same in all models, so their output is computed once for each distinct row, in one file
    (`cache_below`): whoever opens it hashes all weights below. Other batches run through all layers.
    """
    known = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    cached = cache_below(model, [{"input_ids": np.array(row)} for row in known], folder, layer=layer, progress=progress)

    def begin_above(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        found = [known[tuple(row)] for row in ids.tolist() if tuple(row) in known]
        if len(found) < len(ids) or kwargs.get("past_key_values") is not None:
            return args, kwargs
        states = [cached[number][FUSION_INPUT] for number in found]
        places = [(row, slice(None)) for row in range(len(found))]
        return args, kwargs | {FUSION_INPUT: fusion_input(states, places, ids.shape).to(ids.device)}

    # before the hook of cache_below, which takes fusion_input out of the arguments
    model.register_forward_pre_hook(begin_above, with_kwargs=True, prepend=True)


def score_arm(
    name: str,
    scorer: CausalScorer,
    tests: Mapping[str, Any],
    asked: Mapping[str, Questions],
    texts: Mapping[str, Sequence[str]],
    *,
    large: int,
    say: Callable[[str], object],
    cuts: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The result rows of one arm, for each of its tests and each set or kind of text.

    Args:
        tests: the retriever of each test, by what the tokens see; None for a model without images.
        large: sets with more items than this are asked in the first test only.
        say: called with a line about what is being scored.
        cuts: of tests with a `min_score` that is not the model's own, that.
    """
    rows = []
    for number, (images, retriever) in enumerate(tests.items()):
        if images in cuts:
            scorer.model.set_min_score(cuts[images])
        if retriever is not None:
            scorer.model.set_retriever(retriever)
        row = {"arm": name, "images": images}
        for set_name, one in asked.items():
            if number == 0 or len(one.items) <= large:
                say(f"{name}, {images}, {set_name}")
                rows.append(row | {"set": set_name} | answers_of(scorer, one))
        for kind, documents in texts.items():
            say(f"{name}, {images}, {kind}")
            rows.append(row | {"text": kind} | predicted(scorer, documents))
        if images in cuts:
            scorer.model.set_retriever(None)
            scorer.model.set_min_score(None)
    return rows
