"""Several models on several tasks, side by side, for `valm eval`. A run that was killed resumes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.evaluation.controls import images_fingerprint
from valm.evaluation.metrics import choice_metrics, document_metrics
from valm.evaluation.questions import FAIR, PUBLISHED, Documents, Questions, Task, what_is_asked
from valm.evaluation.scorers import DocumentScore, NotApplicable, Scorer, digest, open_scorer
from valm.evaluation.size import objects_of
from valm.evaluation.statistics import paired
from valm.progress import progress_bar
from valm.store.files import name_of, read_json, write_json
from valm_kernels import __version__
from valm_kernels.atomic_files import remove_leftovers

CACHE = "cache"
CACHE_VERSION = 4  # of its files; those of another are scored again
# What a model sees that retrieves no images of a knowledge base too: its own, or none.
UNREPLACED = (("on", None), ("off", None))
RESULTS = "results.json"
REMEDY = "delete it and run again"


@dataclass(frozen=True)
class Entry:
    """A model of the comparison. sources: its checkpoints, several where they differ in their seed."""

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The options of an evaluation.

    Attributes:
        no_images, random_images, replace: each adds a row for every model that sees images: without images, with random
            ones of its knowledge base, with those of the folder `replace` instead.
    """

    tasks: tuple[Task, ...]
    protocols: tuple[str, ...] = (PUBLISHED, FAIR)
    data: str | os.PathLike | None = None
    limit: int | None = None
    kb: str | os.PathLike | None = None
    clip: str | None = None
    allow_download: bool = False
    device: str | torch.device = "cpu"
    query_dtype: torch.dtype | None = None
    min_score: float | None = None
    no_images: bool = False
    random_images: bool = False
    replace: str | os.PathLike | None = None

    @property
    def variants(self) -> dict[str, tuple[str, str | os.PathLike | None]]:
        """The arguments of `switch_images` for each row of a model that sees images, by the row's name."""
        found: dict[str, tuple[str, str | os.PathLike | None]] = {"": ("on", None)}
        if self.no_images:
            found["no images"] = ("off", None)
        if self.random_images:
            found["random images"] = ("random", None)
        if self.replace is not None:
            found[f"images of {Path(self.replace).name}"] = ("on", self.replace)
        return found


class Scores(TypedDict, total=False):
    """A file of the cache: the scores of one model on one task, or why it does not apply."""

    scores: list[Any]
    alone: list[Any] | None
    documents: list[Any]
    not_applicable: str


def entries(names: Sequence[str]) -> list[Entry]:
    """The models of arguments like FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER (checkpoints of several seeds).

    Raises:
        ValmError: two are the same, or have the same name.
    """
    found: list[Entry] = []
    for text in names:
        name, equals, sources = text.partition("=")
        if equals and not Path(text).exists():
            entry = Entry(name, tuple(filter(None, sources.split(","))))
        else:
            entry = Entry(name_of(text, [other.name for other in found]), (text,))
        if not entry.sources or not entry.name:
            raise ValmError(f"{text!r} names no model; give FOLDER or NAME=FOLDER,FOLDER")
        if any(os.path.realpath(text) == os.path.realpath(other.sources[0]) for other in found if not equals):
            raise ValmError(f"the model {text} is given twice: leave one out")
        if entry.name in {other.name for other in found}:
            raise ValmError(f"two models are called {entry.name!r}: give them names, NAME={entry.sources[0]}")
        found.append(entry)
    return found


def evaluate(
    models: Sequence[Entry], settings: Settings, out: str | os.PathLike | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Every model on every task in every protocol that it has.

    Args:
        out: the folder whose CACHE is read and extended.

    Returns:
        The content of results.json: rows, one for each model, images, task and protocol; pairs, the differences between
        the first row and each other one on the same task; and what the numbers depend on.

    Raises:
        ValmError: data, a model or its images are missing or do not belong together. This is checked before scoring.
    """
    asked = asked_by(settings)
    variants = {
        source: variants_of(open_with(source, settings), settings) for entry in models for source in entry.sources
    }
    cache = None if out is None else Path(out) / CACHE
    if cache is not None and cache.is_dir():
        remove_leftovers(cache)
    total = sum(map(_size, asked.values())) * sum(map(len, variants.values()))
    rows: list[dict[str, Any]] = []
    compared: list[Any] = []
    query_dtype: torch.dtype | None = None  # the same for all models that have one, as all are opened alike
    with progress_bar(total=total, unit="text", unit_scale=True, shown=progress) as bar:
        for entry in models:
            scored: dict[tuple[str, str, str], list[Scores]] = {}
            kinds: dict[str, None] = {}
            for source in entry.sources:
                scorer = open_with(source, settings)
                kinds[scorer.kind] = None
                query_dtype = query_dtype or scorer.query_dtype
                own = None if cache is None else scorer.fingerprint
                for variant in variants[source]:
                    retrieval, replace = settings.variants[variant]
                    scorer.switch(retrieval, replace)
                    images = [retrieval, None if replace is None else images_fingerprint(replace)]
                    for key, one in asked.items():
                        bar.set_description(", ".join(filter(None, (entry.name, variant, key[0]))))
                        of_unit = scores_of(scorer, one, cache, [own, images], bar)
                        scored.setdefault((variant, *key), []).append(of_unit)
            for (variant, task, protocol), of_seeds in scored.items():
                row, values = _row(entry, "; ".join(kinds), variant, asked[task, protocol], of_seeds)
                rows.append(row)
                compared.append(values)
    return {
        "rows": rows,
        "pairs": _pairs(rows, compared),
        "tasks": [_about(task, asked) for task in settings.tasks],
        "conditions": {
            "valm": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
            "limit": settings.limit,
            "knowledge_base": None if settings.kb is None else str(settings.kb),
            "query_dtype": None if query_dtype is None else str(query_dtype).removeprefix("torch."),
        },
    }


def asked_by(settings: Settings) -> dict[tuple[str, str], Questions | Documents]:
    """The questions of each task in each of its protocols.

    Raises:
        ValmError: there are none, or data are missing or do not parse.
    """
    asked = {
        (task.name, protocol): what_is_asked(
            task,
            protocol,
            settings.data,
            allow_download=settings.allow_download,
            limit=settings.limit,
        )
        for task in settings.tasks
        for protocol in settings.protocols
        if protocol in task.protocols
    }
    if not asked:
        raise ValmError(f"none of the tasks has the protocol {', '.join(settings.protocols)}")
    return asked


def open_with(source: str, settings: Settings) -> Scorer:
    """Opens the model `source` with the settings."""
    return open_scorer(
        source,
        kb=settings.kb,
        clip=settings.clip,
        allow_download=settings.allow_download,
        device=settings.device,
        query_dtype=settings.query_dtype,
        min_score=settings.min_score,
    )


def variants_of(scorer: Scorer, settings: Settings) -> list[str]:
    """The variants that the model has; checked before any long work.

    Raises:
        ValmError: the images of one do not exist.
    """
    if not scorer.sees_images:
        return [""]
    chosen = {name: sees for name, sees in settings.variants.items() if scorer.retrieves or sees in UNREPLACED}
    for retrieval, replace in chosen.values():
        scorer.switch(retrieval, replace)
    return list(chosen)


def _size(asked: Questions | Documents) -> int:
    return len(asked.texts) * (len(asked.texts[0]) if isinstance(asked, Questions) else 1)


def scores_of(scorer: Scorer, asked: Questions | Documents, cache: Path | None, own: list[Any], bar: Any) -> Scores:
    """The scores from the cache, or from the model, which are then cached.

    The key is a digest of all that the scores depend on: weights, tokenizer, knowledge base and retrieval settings, the
    questions themselves (and so data and prompts), and the version of this package.
    """
    file = None
    if cache is not None:
        key = digest([CACHE_VERSION, own, asdict(asked), __version__])
        file = cache / f"{asked.task}-{asked.protocol}-{key[:32]}.json"
    if file is not None and file.is_file():
        bar.update(_size(asked))
        known: Scores = read_json(file, "the scores", Scores, REMEDY)
        if not _fits(known, asked):
            raise ValmError(f"the scores {file} are not of this task; {REMEDY}")
        return known
    found: Scores
    done = bar.n
    try:
        if isinstance(asked, Questions):
            scores, alone = scorer.answers(asked, bar.update)
            found = {"scores": scores.tolist(), "alone": None if alone is None else alone.tolist()}
        else:
            found = {"documents": [list(asdict(score).values()) for score in scorer.documents(asked, bar.update)]}
    except NotApplicable as error:
        found = {"not_applicable": str(error)}
    if not _fits(found, asked):  # the first NaN would be the answer
        raise ValmError(
            f"the scores of {asked.task} are NaN: weights of the {scorer.kind} are not finite, or its numbers overflow"
        )
    bar.update(_size(asked) - (bar.n - done))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return found


def _fits(found: Scores, asked: Questions | Documents) -> bool:
    """Whether scores out of a file have a number where one is expected."""
    if "not_applicable" in found:
        return True
    try:
        if isinstance(asked, Documents):
            scores = [list(asdict(DocumentScore(*values)).values()) for values in found["documents"]]
            return _are_numbers(scores, (len(asked.texts), len(fields(DocumentScore))))
        shape = (len(asked.texts), len(asked.texts[0]), len(asked.candidates))
        alone = found["alone"]
        return (alone is None or _are_numbers(alone, shape[2:])) and _are_numbers(found["scores"], shape)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _are_numbers(values: list[Any], shape: tuple[int, ...]) -> bool:
    """Whether nested lists have this shape and hold numbers alone: no NaN, and no null, which numpy would make one."""
    array = np.array(values)
    return array.shape == shape and array.dtype.kind in "iuf" and not np.isnan(array).any()


def _row(
    entry: Entry, kind: str, variant: str, asked: Questions | Documents, of_seeds: Sequence[Scores]
) -> tuple[dict[str, Any], Any]:
    """A row of the results, and what two rows are compared by: (hits or nats (seeds, items), tries (items,), objects
    as in `paired`)."""
    row: dict[str, Any] = {
        "model": entry.name if not variant else f"{entry.name}, {variant}",
        "kind": kind,
        "checkpoints": len(of_seeds),
        "task": asked.task,
        "protocol": asked.protocol,
        "items": len(asked.texts),
    }
    refused = next((one["not_applicable"] for one in of_seeds if "not_applicable" in one), None)
    if refused is not None:
        return row | {"not_applicable": refused}, None
    if isinstance(asked, Questions):
        scores = np.array([one["scores"] for one in of_seeds])  # (seeds, items, prompts, candidates)
        alone = None
        if all(one["alone"] is not None for one in of_seeds):
            alone = np.array([one["alone"] for one in of_seeds])
        correct = scores.argmax(-1) == np.array(asked.right)
        tries = np.full(len(asked.items), float(len(asked.texts[0])))
        row |= {"prompts": len(asked.texts[0]), "metrics": choice_metrics(asked, scores, alone)}
        return row, ("accuracy", correct.sum(-1).astype(float), tries, objects_of(asked.items, asked.candidates))
    documents = [[DocumentScore(*fields) for fields in one["documents"]] for one in of_seeds]
    row["metrics"] = document_metrics(asked, documents)
    if asked.last_word:
        known = np.array([[float(score.known) for score in of_seed] for of_seed in documents])
        return row, ("accuracy", known, np.ones(known.shape[1]), None)
    nats = np.array([[score.nats for score in of_seed] for of_seed in documents])
    return row, ("nats per byte", nats, np.array([float(score.bytes) for score in documents[0]]), None)


def _pairs(rows: Sequence[Mapping[str, Any]], compared: Sequence[Any]) -> list[dict[str, Any]]:
    """The first model against each other one, on the same items."""
    found = []
    for number, row in enumerate(rows):
        same = [i for i in range(number) if all(rows[i][key] == row[key] for key in ("task", "protocol"))]
        if not same or compared[same[0]] is None or compared[number] is None:
            continue
        metric, first, tries, objects = compared[same[0]]
        _, second, *_ = compared[number]
        named = {"task": row["task"], "protocol": row["protocol"], "metric": metric}
        models = {"first": rows[same[0]]["model"], "second": row["model"]}
        found.append(named | models | asdict(paired(first, second, tries, objects=objects)))
    return found


def _about(task: Task, asked: Mapping[tuple[str, str], Questions | Documents]) -> dict[str, Any]:
    protocols = [protocol for name, protocol in asked if name == task.name]
    return {
        "task": task.name,
        "title": task.title,
        "group": task.group,
        "table": task.table,
        "note": task.note,
        "protocols": protocols,
    }
