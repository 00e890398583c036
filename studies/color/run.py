"""Runs a study from pictures to results. Each stage is a command of valm, or a few lines of `studies.color`.

All seeds share OUT/pictures. The files of a seed are in OUT/seed-N:

    text/  clip/  kb-others/  kb/  kb-pictures-75/ …  retrieval-train/  valm/  valm-60/ …  scores/  results.json

scores/ contains a file for each arm and choice of tests, with the hash of the tests in its name. results.json contains
the tests of the last run.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import math
import random
import shutil
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from typing_extensions import TypedDict

import valm
import valm_kernels
from studies.color.clip import image_tower
from studies.color.config import BASE, DOSES, KB, KB_OTHERS, RECIPE, VALIDATION, VALM, Training
from studies.color.pictures import Picture, collect_pictures, read_pictures
from studies.color.questions import COLOR_SETS, item_names
from studies.color.seed_scores import Scoring
from studies.color.study import STUDY_FILE, Study
from studies.color.text import study_text
from studies.color.words import Names
from valm.errors import ValmError
from valm.evaluation.files import read_csv
from valm.model.smollm2 import PACKAGE, convert_smollm2
from valm.store.files import read_json, writable_folder, write_json
from valm.store.folders import remove_folder
from valm.store.settings import check_same
from valm.store.stages import Stages

RESULTS_FILE = "results.json"
# Two tables of pictures: those that show an item of MemoryColor or ColorTerms, and the rest.
ITEMS, OTHERS = "items.csv", "others.csv"
RETRIEVAL = "retrieval-train"
# A value of `image_tower` in a study's `clip`; any other value is a CLIP for `valm clip train --image-tower`.
PACKAGE_TOWER = "efficientnet-lite0"


def run_study(study: Study, seeds: Sequence[int] | None = None) -> dict[int, Path]:
    """Runs the unfinished stages of all seeds, or of `seeds`, and returns the results file of each seed.

    Raises:
        ValmError: a stage fails, the folder contains a study of another recipe, or the study lacks a seed of `seeds`.
    """
    config = study.config
    for seed in seeds or ():
        if seed not in config.seeds:
            raise ValmError(f"the study {config.name} has no seed {seed}, only {', '.join(map(str, config.seeds))}")
    writable_folder(study.out)
    _note_study(study)
    shared = Stages(study.out / "stages-shared.json", progress=study.progress)
    shared("pictures", lambda: _make_pictures(study))
    base = language_model(config.language_model, study.out / "language-model")
    files = {}
    for seed in seeds or config.seeds:
        files[seed] = _run_seed(study, seed, base)
    return files


def language_model(name: str, out: Path) -> str:
    """The value of `valm train --base` for `name`. Converts PACKAGE into the folder `out` if it is not there yet."""
    if name != PACKAGE:
        return name
    if not (out / "config.json").is_file():
        convert_smollm2(out)
    return str(out)


def sources_hash() -> str:
    """A hash of the Python files of the studies, of valm and of valm_kernels."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(valm.__file__).parent, Path(valm_kernels.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package.parent)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class _Note(TypedDict):
    """The content of STUDY_FILE. sources: every `sources_hash` of code that ran stages."""

    recipe: str
    config: dict[str, Any]
    sources: list[str]


def _note_study(study: Study) -> None:
    file, sources = study.out / STUDY_FILE, []
    note: _Note = {"recipe": study.config.recipe, "config": study.config.to_json(), "sources": []}
    if file.is_file():
        before: _Note = read_json(file, "the note on a study", _Note, "choose another folder")
        there, here = (
            {**{name: of["config"].get(name) for name in RECIPE}, "recipe": of["recipe"]} for of in (before, note)
        )
        check_same(f"{study.out} holds another study", there, here, "choose another folder")
        sources = before["sources"]
    now = sources_hash()
    if set(sources) - {now}:
        warnings.warn(f"earlier stages in {study.out} ran with other code than today's: see {STUDY_FILE}", stacklevel=3)
    write_json(file, note | {"sources": list(dict.fromkeys([*sources, now]))})


def _make_pictures(study: Study) -> None:
    """Writes the images and two tables of them: those that show an item of MemoryColor or ColorTerms, and the rest."""
    pictures = collect_pictures(study.config.pictures, study.pictures, progress=study.progress)
    names = Names(item_names(COLOR_SETS[:2], study.data))
    of_items = [picture.caption in names for picture in pictures]
    rows: dict[str, list[list[str]]] = {ITEMS: [], OTHERS: []}
    for picture, is_item in zip(pictures, of_items, strict=True):
        rows[ITEMS if is_item else OTHERS].append([picture.file, picture.caption])
    for table, some in rows.items():
        if not some:
            raise ValmError(
                f"{'no' if table == ITEMS else 'every'} picture shows an item of the test sets: add sources"
            )
        _write_table(study.pictures / table, some)


def _write_table(file: Path, rows: Iterable[Sequence[str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["image", "caption"])
        writer.writerows(rows)


def _run_seed(study: Study, seed: int, base: str) -> Path:
    config, folder = study.config, writable_folder(study.seed_folder(seed))
    stage = Stages(folder / "stages.json", f"seed {seed}, ", study.progress)
    pictures = read_pictures(study.pictures)
    stage("text", lambda: _write_text(study, pictures, seed, folder / "text"))
    _prepare(study, seed, base, folder, stage)
    for training in config.trainings:
        stage(training.name, partial(_train, study, training, base, seed))
    scoring, rows = Scoring(study, seed, base, pictures), {}
    for name in [name for name in config.arms if name == BASE] + [training.name for training in config.trainings]:
        rows[name] = scoring.file(name)
        title = f"scores of {name} on {', '.join(scoring.names)}"
        if not rows[name].is_file():  # also if an earlier run asked other contents
            stage.seconds.pop(title, None)
        stage(title, partial(scoring.write, name, rows[name]))
    results = folder / (f"{VALIDATION}-{RESULTS_FILE}" if study.validation else RESULTS_FILE)
    write_json(results, scoring.results(rows) | {"seconds": stage.seconds}, indent=None)
    return results


def _prepare(study: Study, seed: int, base: str, folder: Path, stage: Stages) -> None:
    """Makes a CLIP, its knowledge bases and the images of the training text in `folder`."""
    config, clip = study.config, study.clip(seed)
    if clip == str(folder / "clip"):
        stage("clip", lambda: _train_clip(study, seed, folder))
    hub = ["--allow-download"] if config.allow_download else []
    table = ["--format", "csv"]
    others = ["kb", "build", study.pictures / OTHERS, *table, "--clip", clip, "--out", folder / KB_OTHERS]
    stage(KB_OTHERS, lambda: study.valm(*others))

    def add(items: str, kb: str) -> None:
        study.valm("kb", "add", folder / KB_OTHERS, study.pictures / items, *table, "--out", folder / kb, *hub)

    def add_dose(dose: str) -> None:
        add(_dose_table(study, seed, dose), f"{KB}-{dose}")

    stage(KB, lambda: add(ITEMS, KB))
    for dose in DOSES if VALM in config.arms else ():
        stage(f"{KB}-{dose}", partial(add_dose, dose))
    options = ("--kb", folder / KB_OTHERS, "--tokenizer", base, "-k", config.images, "--out", folder / RETRIEVAL, *hub)
    stage(RETRIEVAL, lambda: study.valm("retrieve", folder / "text" / "train.jsonl", *options))


def _dose_table(study: Study, seed: int, dose: str) -> str:
    """Writes a table with some of the items' pictures. A larger dose contains the pictures of every smaller dose."""
    rows = [list(row.values()) for row in read_csv(study.pictures / ITEMS, ["image", "caption"])]
    random.Random(f"{seed} doses").shuffle(rows)
    name = f"seed-{seed}-{dose}.csv"
    _write_table(study.pictures / name, rows[: math.ceil(len(rows) * DOSES[dose] / 100)])
    return name


def _write_text(study: Study, pictures: Sequence[Picture], seed: int, out: Path) -> None:
    names, heads = item_names(COLOR_SETS, study.data), item_names(COLOR_SETS[:2], study.data)
    text = study_text(study.config.text, pictures, names, seed=seed, head_noun_items=heads)
    text.write(out)


def _train_clip(study: Study, seed: int, folder: Path) -> None:
    options = dict(study.config.clip)
    if options.get("image_tower") == PACKAGE_TOWER:
        options["image_tower"] = image_tower(study.out / "tower")
    shutil.rmtree(folder / "clip", ignore_errors=True)  # a killed training begins again
    where = ["--captions", folder / "text" / "captions.json", "--out", folder / "clip", "--seed", seed]
    study.valm("clip", "train", study.pictures, *where, *as_options(options))


def _train(study: Study, training: Training, base: str, seed: int) -> None:
    folder = study.seed_folder(seed)
    out = folder / training.name
    study.valm(
        *("train", "--base", base, "--retrieval", folder / RETRIEVAL, "--kb", folder / KB_OTHERS),
        *(["--twin", training.arm.twin] if training.arm.twin else []),
        *("--cache-below", study.out / "below", "--out", out, "--resume"),
        *("--seed", seed, "--logging_steps", "1"),
        *as_options(training.options),
        *(["--allow-download"] if study.config.allow_download else []),
    )
    _remove_checkpoints(out)


def _remove_checkpoints(out: Path) -> None:
    """Removes the checkpoints of a finished training."""
    for checkpoint in out.glob("checkpoint-*"):
        remove_folder(checkpoint)


def as_options(settings: dict[str, Any]) -> list[str]:
    """{"batch_size": 24, "limit_softmax": True} as ["--batch-size", "24", "--limit-softmax"]."""
    trainers = {one.name for one in dataclasses.fields(TrainingArguments)}  # whose options have underscores
    options = []
    for name, value in settings.items():
        if value is False and name not in trainers:
            continue
        options.append(f"--{name}" if name in trainers else f"--{name.replace('_', '-')}")
        if value is not True:
            options.append(str(value))
    return options
