"""Evaluates several models on several tasks, for `valm eval`. A killed run resumes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from valm.errors import ValmError
from valm.evaluation.controls import OFF, ON, RANDOM, images_fingerprint
from valm.evaluation.metrics import calibrated_right, choice_metrics, document_metrics
from valm.evaluation.questions import Documents, Questions, chosen_sets, what_is_asked
from valm.evaluation.scorers import NotApplicable, Scorer, check_source, digest, open_scorer
from valm.evaluation.sets import OWN, EvaluationSet, own_sets
from valm.evaluation.settings import Settings
from valm.evaluation.statistics import as_json, paired
from valm.knowledge_base.sources.folder import find_images
from valm.progress import progress_bar
from valm.store.files import short_names
from valm.store.parts import MODEL, control_of, part_of, read_parts
from valm_kernels import __version__
from valm_kernels.atomic_files import atomic_path, remove_leftovers

CACHE = "cache"
CACHE_VERSION = 5  # of the cached files; another version is scored again
RESULTS = "results.json"


class Control(NamedTuple):
    """Which images a model sees in a row: the arguments of `switch_images`."""

    retrieval: str = ON
    replace: str | None = None


# The scores of a model on a task: arrays by name, or why the task does not apply.
Scores = dict[str, np.ndarray]
# By task and protocol.
Asked = dict[tuple[str, str], Questions | Documents]


def named(models: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The checkpoints of each model by its name, from arguments FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER (checkpoints
    of several seeds). Without a NAME, the name is the end of the path, long enough to tell the models apart. What
    `valm pictures` made is a model and a control. Raises ValmError if two models are equal or have the same name."""
    found: dict[str, tuple[str, ...]] = {}
    folders = [text for text in models if "=" not in text or Path(text).exists()]
    real = [os.path.realpath(folder) for folder in folders]
    names = dict(zip(folders, short_names(folders), strict=True))
    for text in models:
        sources: tuple[str, ...] = (text,)
        if text in names:
            if real.count(os.path.realpath(text)) > 1:
                raise ValmError(f"the model {text} is given twice: give it once")
            name = names[text]
        else:
            name, _, rest = text.partition("=")
            sources = tuple(filter(None, rest.split(",")))
        if not sources or not name:
            raise ValmError(f"{text!r} names no model: give FOLDER or NAME=FOLDER,FOLDER")
        if name in found:
            raise ValmError(f"two models are called {name!r}: give them names, NAME={sources[0]}")
        found[name] = tuple(source if read_parts(source) is None else str(part_of(source, MODEL)) for source in sources)
        controls = [control for source in sources if (control := control_of(source)) is not None]
        if controls:
            found[f"{name}, {controls[0].name}"] = tuple(map(str, controls))
    return found


def evaluate(
    models: Mapping[str, Sequence[str]],
    settings: Settings,
    out: str | os.PathLike | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates every model on every task in each of the task's protocols.

    Args:
        models: the checkpoints of each model by its name; several checkpoints differ in their seed.
        out: the folder whose CACHE is read and extended.

    Returns:
        The content of results.json: rows, one for each model, images, task and protocol; pairs, the differences between
        the first row and each other row on the same task; and what the numbers depend on.

    Raises:
        ValmError: data, a model or its images are missing or do not belong together. All that needs no model is checked
            before a model is loaded; the rest is checked before a model is scored.
    """
    tasks = ("color",) if settings.tasks is None and not settings.ask else settings.tasks
    sets = [*([] if tasks is None else chosen_sets(tasks)), *own_sets(settings.ask)]
    asked = asked_by(settings, sets)
    controls = controls_of(settings)
    for source in (source for sources in models.values() for source in sources):
        check_source(source, settings.allow_download)
    cache = None if out is None else Path(out) / CACHE
    if cache is not None and cache.is_dir():
        remove_leftovers(cache)
    rows: list[dict[str, Any]] = []
    compared: list[list[Any]] = []
    dtypes: list[torch.dtype | None] = []
    total = sum(map(_size, asked.values())) * sum(map(len, models.values()))
    with progress_bar(total=total, unit="text", unit_scale=True, shown=progress) as bar:
        for name, sources in models.items():
            scored: dict[tuple[str, str, str], list[Scores]] = {}
            kinds: dict[str, None] = {}
            for source in sources:
                scorer = open_scorer(source, settings)
                kinds[scorer.kind] = None
                dtypes.append(scorer.query_dtype)
                for key, scores in _scores_of_model(name, scorer, asked, controls, cache, bar).items():
                    scored.setdefault(key, []).append(scores)
                del scorer  # before the next model is loaded
            for (variant, task, protocol), of_seeds in scored.items():
                model = {"model": f"{name}, {variant}" if variant else name, "kind": "; ".join(kinds)}
                row, values = _row(model, asked[task, protocol], of_seeds)
                rows.append(row)
                compared.append(values)
    query_dtype = next(filter(None, dtypes), None)  # equal for all models that have one
    return {
        "rows": rows,
        "pairs": _pairs(rows, compared),
        "tasks": [
            {"task": one.name, "title": one.title, "group": one.group, "table": one.table, "note": one.note}
            | {"protocols": [protocol for name, protocol in asked if name == one.name]}
            for one in sets
        ],
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


def asked_by(settings: Settings, sets: Sequence[EvaluationSet]) -> Asked:
    """The questions of each set in each chosen protocol; the user's own questions have only the fair protocol. Raises
    ValmError if there are no questions, or data are missing or do not parse."""
    asked = {
        (one.name, protocol): what_is_asked(
            one, protocol, settings.data, allow_download=settings.allow_download, limit=settings.limit
        )
        for one in sets
        for protocol in (one.protocols if one.group == OWN else settings.protocols)
        if protocol in one.protocols
    }
    if not asked:
        raise ValmError(f"none of the tasks has the protocol {', '.join(settings.protocols)}")
    return asked


def controls_of(settings: Settings) -> dict[str, Control]:
    """The rows of a model that sees images, by the part of their name that describes the images. Raises ValmError if a
    word of `controls` is unknown, or a folder contains no images."""
    found = {"": Control()}
    folders = [word for word in settings.controls if word not in (OFF, RANDOM)]
    names = dict(zip(folders, short_names(folders), strict=True))
    for word in settings.controls:
        if word in names:
            if not Path(word).is_dir():
                raise ValmError(
                    f"--controls: {word} is no folder of images: give off, random or a folder, with commas between them"
                )
            find_images(Path(word))
            found[f"images of {names[word]}"] = Control(replace=word)
        else:
            found[f"{'no' if word == OFF else word} images"] = Control(word)
    return found


def _scores_of_model(
    name: str, scorer: Scorer, asked: Asked, controls: Mapping[str, Control], cache: Path | None, bar: Any
) -> dict[tuple[str, str, str], Scores]:
    """The scores by control, task and protocol."""
    chosen = controls_for(scorer, controls)
    bar.total += sum(map(_size, asked.values())) * (len(chosen) - 1)
    own = None if cache is None else scorer.fingerprint
    found = {}
    for variant, control in chosen.items():
        scorer.switch(*control)
        key = None
        if cache is not None:
            replaced = None if control.replace is None else images_fingerprint(control.replace)
            key = [own, control.retrieval, replaced]
        for (task, protocol), one in asked.items():
            bar.set_description(", ".join(filter(None, (name, variant, task))))
            found[variant, task, protocol] = scores_of(scorer, one, cache, key, bar)
    return found


def controls_for(scorer: Scorer, controls: Mapping[str, Control]) -> dict[str, Control]:
    """The controls that apply to the model: if it retrieves no images of a knowledge base, only its own images or none.
    Raises ValmError if the model cannot see the images of a control."""
    if not scorer.sees_images:
        return {"": Control()}
    unreplaced = (Control(ON), Control(OFF))
    chosen = {name: control for name, control in controls.items() if scorer.retrieves or control in unreplaced}
    for control in chosen.values():
        scorer.switch(*control)
    return chosen


def _size(asked: Questions | Documents) -> int:
    return len(asked.texts) * (len(asked.texts[0]) if isinstance(asked, Questions) else 1)


def scores_of(scorer: Scorer, asked: Questions | Documents, cache: Path | None, own: Any, bar: Any) -> Scores:
    """The scores from the cache, or from the model; new scores are cached.

    The key is a digest of everything that the scores depend on: weights, tokenizer, knowledge base and retrieval
    settings (`own`), the questions (hence data and prompts), and the version of this package.
    """
    file = None
    if cache is not None:
        key = digest([CACHE_VERSION, own, asdict(asked), __version__])
        file = cache / f"{asked.task}-{asked.protocol}-{key[:32]}.npz"
        # missing and damaged files are scored again; zipfile raises many types
        with suppress(Exception), np.load(file) as known:
            found = dict(known)
            bar.update(_size(asked))
            return found
    done = bar.n
    try:
        if isinstance(asked, Questions):
            scores, alone = scorer.answers(asked, bar.update)
            found = {"scores": scores.double().numpy()}
            if alone is not None:
                found["alone"] = alone.double().numpy()
        else:
            found = scorer.documents(asked, bar.update)
        if any(np.isnan(values).any() for values in found.values()):  # argmax would choose the first NaN
            raise ValmError(
                f"the scores of {asked.task} are NaN: weights of the {scorer.kind} are not finite, or its numbers "
                "overflow"
            )
    except NotApplicable as error:
        found = {"not_applicable": np.array(str(error))}
    bar.update(_size(asked) - (bar.n - done))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **found)
    return found


def _row(
    model: Mapping[str, str], asked: Questions | Documents, of_seeds: Sequence[Scores]
) -> tuple[dict[str, Any], list[Any]]:
    """A row of the results, and for each metric by which rows are compared: (metric, hits or nats (seeds, items), tries
    (items,), objects as in `paired`)."""
    row: dict[str, Any] = {
        **model,
        "checkpoints": len(of_seeds),
        "task": asked.task,
        "protocol": asked.protocol,
        "items": len(asked.texts),
    }
    refused = next((str(one["not_applicable"]) for one in of_seeds if "not_applicable" in one), None)
    if refused is not None:
        return row | {"not_applicable": refused}, []
    stacked = {
        name: np.stack([one[name] for one in of_seeds]) for name in of_seeds[0] if all(name in one for one in of_seeds)
    }
    if isinstance(asked, Questions):
        scores = stacked["scores"]  # (seeds, items, prompts, candidates)
        row |= {"prompts": scores.shape[2], "metrics": choice_metrics(asked, scores, stacked.get("alone"))}
        right = {
            "accuracy": scores.argmax(-1) == np.array(asked.right),
            "calibrated by mean": calibrated_right(asked, scores),
        }
        tries = np.full(len(asked.items), float(scores.shape[2]))
        hits = {metric: found.sum(-1).astype(float) for metric, found in right.items() if found is not None}
        return row, [(metric, of_items, tries, asked.objects) for metric, of_items in hits.items()]
    row["metrics"] = document_metrics(asked, stacked)
    if asked.last_word:
        return row, [("accuracy", stacked["known"], np.ones(len(asked.texts)), None)]
    return row, [("nats per byte", stacked["nats"], stacked["bytes"][0], None)]


def _pairs(rows: Sequence[Mapping[str, Any]], compared: Sequence[list[Any]]) -> list[dict[str, Any]]:
    """Compares the first model with each other model on the same items."""
    found = []
    for number, row in enumerate(rows):
        same = [i for i in range(number) if all(rows[i][key] == row[key] for key in ("task", "protocol"))]
        if not same:
            continue
        for (metric, first, tries, objects), (_, second, *_) in zip(compared[same[0]], compared[number], strict=False):
            of = {"task": row["task"], "protocol": row["protocol"], "metric": metric}
            both = {"first": rows[same[0]]["model"], "second": row["model"]}
            found.append(of | both | as_json(paired(first, second, tries, objects=objects), row["items"]))
    return found
