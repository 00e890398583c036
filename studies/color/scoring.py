"""The answers of one seed's models, item by item, and the counts of each measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.color.config import EXCHANGES, arm_of, of_curve
from studies.color.results import APART, CALIBRATED, NATS, RAW, SHOWN, RowJson
from valm.clip.tokenizer import begin_id
from valm.evaluation.metrics import log_prior
from valm.evaluation.questions import FAIR, Documents, Questions
from valm.evaluation.scorers import CausalScorer
from valm.evaluation.scoring import Progress, answer_tokens
from valm.training.cache_below import FUSION_INPUT, cache_below, fusion_input


def answers_of(
    scorer: CausalScorer, asked: Questions, pictured: np.ndarray | None = None, progress: Progress = None
) -> dict[str, np.ndarray]:
    """The number of the most probable candidate for each item and prompt, (items, prompts).

    Args:
        pictured: whether each item has a picture, (items,).

    Returns:
        By measure. RAW. If each item has one correct answer for all prompts, CALIBRATED: each candidate's probability
        divided by its mean over the items. With `pictured`, APART: the mean is taken separately over items with and
        items without a picture. Images change the mean of pictured items, which in CALIBRATED also changes the answers
        about unpictured items.
    """
    scores = scorer.answers(asked, progress)[0].double().numpy()  # (items, prompts, candidates)
    found = {RAW: scores.argmax(-1)}
    if _one_right(asked):
        found[CALIBRATED] = (scores - log_prior(scores)).argmax(-1)
    if pictured is not None:
        apart = scores.copy()
        for some in (pictured, ~pictured):
            if some.any():
                apart[some] -= log_prior(scores[some])
        found[APART] = apart.argmax(-1)
    return found


def _one_right(asked: Questions) -> bool:
    return all(len(set(right)) == 1 for right in asked.right)


class Counted(NamedTuple):
    """What a measure counts in the answers to a set: the answers to `items` (numbers of items) that equal `answers`
    (items, prompts or 1)."""

    items: list[int]
    answers: np.ndarray


def measures(asked: Questions, colors: Sequence[Mapping[str, str | None]]) -> dict[str, Counted]:
    """What each measure counts: RAW, CALIBRATED and APART, SHOWN, and each of EXCHANGES that changes the colour of an
    item.

    Args:
        colors: the colours of each item's pictures (`Conditions.colors_of`), or an empty list.
    """
    right, every = np.array(asked.right), list(range(len(asked.right)))
    asked_for = (RAW, CALIBRATED, APART) if _one_right(asked) else (RAW,)
    found = {measure: Counted(every, right) for measure in asked_for}
    candidates = list(asked.candidates)
    for measure in (SHOWN, *EXCHANGES):
        pictures = "retrieved" if measure == SHOWN else measure
        answers = {
            number: candidates.index(color)
            for number, one in enumerate(colors)
            if (color := one[pictures]) in candidates and (measure == SHOWN or one["retrieved"] not in (None, color))
        }
        if answers:
            found[measure] = Counted(list(answers), np.array(list(answers.values()))[:, None])
    return found


def counted(row: Mapping[str, Any], measured: Mapping[str, Counted]) -> list[RowJson]:
    """Turns a row of `score_arm` about a set into rows of results. A further row counts how often the arm answers the
    colour of the pictures (SHOWN). If the arm also sees exchanged images, further rows count how often it answers the
    colour of the exchanged images, with exchanged and with original images."""
    name, images, own = row["arm"], row["images"], row["measure"]
    arm = arm_of(name)
    assert arm is not None
    tests = () if of_curve(name) else arm.tests
    exchanges = [one for one in EXCHANGES if own == RAW and one in tests and images in ("retrieved", one)]
    answers = np.array(row["answers"])
    return [
        {
            "arm": name,
            "images": images,
            "of": row["of"],
            "measure": measure,
            "hits": (answers[measured[measure].items] == measured[measure].answers).sum(-1).tolist(),
        }
        for measure in (own, *([SHOWN] if own == RAW else []), *exchanges)
        if measure in measured
    ]


def nats_of(scorer: CausalScorer, texts: Sequence[str], progress: Progress = None) -> list[float]:
    """The negative log-probability of each text."""
    found = scorer.documents(Documents("heldout", FAIR, tuple(texts), last_word=False), progress)
    return [round(nats, 4) for nats in found["nats"].tolist()]


def question_rows(tokenizer: Any, asked: Questions) -> list[list[int]]:
    """The distinct token sequences that a model reads to answer the questions."""
    begin = begin_id(tokenizer)
    heads = {tuple(ids[:-1]) for ids in answer_tokens(tokenizer, asked.candidates)}
    texts = [text for row in asked.texts for text in row]
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [list(row) for row in dict.fromkeys((begin, *ids, *head) for ids in read for head in sorted(heads))]


def text_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text in the form in which a model predicts it."""
    return [[begin_id(tokenizer), *ids] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def read_from_fusion(model: Any, rows: Iterable[Sequence[int]], folder: Path, *, progress: bool = True) -> None:
    """Makes `model` start at its fusion layer, the layer before the last, for batches of token sequences in `rows`.

    All models share the layers below, so `cache_below` computes their output once for each distinct row, into one file.
    Opening that file hashes all weights below. Batches with other rows run through all layers.
    """
    known = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    documents = [{"input_ids": np.array(row)} for row in known]
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # of the base model too
    cached = cache_below(model, documents, folder, layer=-2, progress=progress)

    def begin_above(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        found = [known[tuple(row)] for row in ids.tolist() if tuple(row) in known]
        if len(found) < len(ids) or kwargs.get("past_key_values") is not None:
            return args, kwargs
        states = [cached[number][FUSION_INPUT] for number in found]
        places = [(row, slice(None)) for row in range(len(found))]
        return args, kwargs | {FUSION_INPUT: fusion_input(states, places, ids.shape).to(ids.device)}

    # before the hook of cache_below, which removes fusion_input from the arguments
    model.register_forward_pre_hook(begin_above, with_kwargs=True, prepend=True)


class Evaluation(NamedTuple):
    """The questions and texts for an arm whose tokens see `images`.

    asked: the question sets. texts: texts for NATS, by kind. retriever: None for a model without images.
    """

    images: str
    asked: Mapping[str, Questions]
    texts: Mapping[str, Sequence[str]]
    retriever: Any = None


def score_arm(
    name: str,
    scorer: CausalScorer,
    tests: Sequence[Evaluation],
    say: Callable[[str], object],
    pictured: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one arm: the answers to each set and the nats of each kind of text, in each of its tests.

    Args:
        say: called with a line that names the current test.
        pictured: for some sets, `pictured` of `answers_of`.
    """
    rows = []
    for test in tests:
        if test.retriever is not None:
            scorer.model.set_retriever(test.retriever)
        row = {"arm": name, "images": test.images}
        for of, one in test.asked.items():
            say(f"{name}, {test.images}, {of}")
            for measure, answers in answers_of(scorer, one, (pictured or {}).get(of)).items():
                rows.append(row | {"of": of, "measure": measure, "answers": answers.tolist()})
        for of, documents in test.texts.items():
            say(f"{name}, {test.images}, {of}")
            rows.append(row | {"of": of, "measure": NATS, "hits": nats_of(scorer, documents)})
    return rows
