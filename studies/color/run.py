"""Runs a study from pictures to results. Each stage is a command of this package, or a few lines of `studies.color`.

All seeds share OUT/pictures. The files of a seed are in OUT/seed-N:

    text/  clip/  kb-others/  kb/  retrieval-train/  twin/  valm/  blind/ …  scores/  results.json

scores/ has a file for each arm and choice of tests, whose hash is in its name; results.json is of the last run's tests.
The CLIP that cannot know colours has its own clip/, kb-others/, kb/ and retrieval-train/ in colorless/.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from typing_extensions import TypedDict

import valm
import valm_kernels
from examples.augment_smollm2 import PACKAGE, convert_smollm2
from studies.color.captions import Captions
from studies.color.clip import image_tower
from studies.color.config import (
    BASE,
    COLORED_CAPTIONS,
    CUTS,
    KB,
    KB_OTHERS,
    LATE,
    NATURAL,
    RECIPE,
    TRAINED,
    VALIDATION,
    Arm,
)
from studies.color.pictures import Picture, collect_pictures, read_pictures
from studies.color.questions import COLOR_SETS, item_names, validation_questions
from studies.color.seed_scores import Scoring
from studies.color.study import COLORLESS, QUESTIONS, STUDY_FILE, TRAINING_FILE, Study
from studies.color.text import drawn_captions, read_texts, study_text, write_texts
from studies.color.training import study_plan, train_late_fusion, train_with_captions
from studies.color.words import Names
from studies.stages import Stages
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.evaluation.sets import load_memory_color
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.files import read_json, writable_folder, write_json
from valm.store.folders import remove_folder
from valm.store.settings import check_same
from valm.training.image_trainer import STATE_FILE
from valm.training.run_note import RUN_FILE

RESULTS_FILE = "results.json"
# How often each picture gets colours drawn at random for that CLIP, unless the study says otherwise.
DRAWN = 4
# A value of `image_tower` in a study's `clip`; any other value is a CLIP for `valm clip train --image-tower`.
PACKAGE_TOWER = "efficientnet-lite0"


def run_study(study: Study, seeds: Sequence[int] | None = None) -> dict[int, Path]:
    """Runs the unfinished stages of all seeds, or of `seeds`, and returns the results file of each seed.

    Raises:
        ValmError: a stage fails; the folder holds a study of another recipe; or it has no such seed.
    """
    config = study.config
    for seed in seeds or ():
        if seed not in config.seeds:
            raise ValmError(f"the study {config.name} has no seed {seed}, only {', '.join(map(str, config.seeds))}")
    writable_folder(study.out)
    _note_study(study)
    shared = Stages(study.out / "stages-shared.json", progress=study.progress)
    shared("pictures", lambda: _make_pictures(study))
    base = _language_model(config.language_model, study.out / "language-model")
    files = {}
    for seed in seeds or config.seeds:
        files[seed] = _run_seed(study, seed, base)
    return files


def _language_model(name: str, out: Path) -> str:
    """The value of `valm train --base` for `name`; PACKAGE is converted into the folder `out`, if not there yet."""
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
    """STUDY_FILE. sources: `sources_hash` of the code that ran stages."""

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
    for table, wanted in (("items.csv", True), ("others.csv", False)):
        rows = [picture for picture, is_item in zip(pictures, of_items, strict=True) if is_item == wanted]
        if not rows:
            raise ValmError(f"{'no' if wanted else 'every'} picture shows an item of the test sets: add sources")
        with open(study.pictures / table, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            writer.writerows([picture.file, picture.caption] for picture in rows)


def _run_seed(study: Study, seed: int, base: str) -> Path:
    config, folder = study.config, writable_folder(study.seed_folder(seed))
    stage = Stages(folder / "stages.json", f"seed {seed}, ", study.progress)
    pictures = read_pictures(study.pictures)
    arms = config.arms_of(seed)
    stage("text", lambda: _write_text(study, pictures, seed, folder / "text"))
    for colorless in dict.fromkeys(arm.colorless for arm in arms.values()):
        some = [arm for arm in arms.values() if arm.colorless == colorless]
        _prepare(study, seed, base, writable_folder(study.kb_folder(seed, some[0])), some, stage)
    for name, arm in arms.items():
        if arm.made != BASE:
            stage(name, partial(_train, study, name, arm, base, seed))
    scoring, rows = Scoring(study, seed, base, pictures), {}
    for name in arms:
        rows[name] = scoring.file(name)
        title = f"scores of {name} on {', '.join(scoring.names)}"
        if not rows[name].is_file():  # also if they were made of other contents
            stage.seconds.pop(title, None)
        stage(title, partial(scoring.write, name, rows[name]))
    results = folder / (f"{VALIDATION}-{RESULTS_FILE}" if study.validation else RESULTS_FILE)
    write_json(results, scoring.results(rows) | {"seconds": stage.seconds}, indent=None)
    return results


def _prepare(study: Study, seed: int, base: str, folder: Path, arms: Sequence[Arm], stage: Stages) -> None:
    """A CLIP, its knowledge bases, and the images of every text that `arms` read; all in `folder`."""
    config, name = study.config, f"{COLORLESS}/" if folder.name == COLORLESS else ""
    clip = study.clip(folder)
    if clip == str(folder / "clip"):
        stage(f"{name}clip", lambda: _train_clip(study, seed, folder))
    others, items = study.pictures / "others.csv", study.pictures / "items.csv"
    hub = ["--allow-download"] if config.allow_download else []
    table = ["--format", "csv"]
    build = ["kb", "build", others, *table, "--clip", clip, "--out", folder / KB_OTHERS]
    stage(f"{name}kb-others", lambda: study.valm(*build))
    add = ["kb", "add", folder / KB_OTHERS, items, *table, "--out", folder / KB, *hub]
    stage(f"{name}kb", lambda: study.valm(*add))
    read = [arm.corpus for arm in arms if arm.made != BASE]
    if any(arm.cut or CUTS.keys() & set(arm.tests) for arm in arms):
        read.append(QUESTIONS)
    for corpus in dict.fromkeys(read):
        retrieval = folder / f"retrieval-{corpus}"
        options = ("--kb", folder / KB_OTHERS, "--tokenizer", base, "-k", config.images, "--out", retrieval, *hub)
        text = study.seed_folder(seed) / "text" / f"{corpus}.jsonl"
        stage(f"{name}{retrieval.name}", partial(study.valm, "retrieve", text, *options))


def _write_text(study: Study, pictures: Sequence[Picture], seed: int, out: Path) -> None:
    names, heads = item_names(COLOR_SETS, study.data), item_names(COLOR_SETS[:2], study.data)
    text = study_text(study.config.text, pictures, names, seed=seed, head_noun_items=heads)
    text.write(out)
    questions = [question for row in validation_questions(text.validation).texts for question in row]
    write_texts(out / f"{QUESTIONS}.jsonl", questions)


def _train_clip(study: Study, seed: int, folder: Path) -> None:
    options, pictures = dict(study.config.clip), study.pictures
    text = study.seed_folder(seed) / "text"
    captions = text / "captions.json"
    if folder.name == COLORLESS:
        options |= study.config.colorless_clip
        pictures, captions = folder / "pictures", folder / "captions.json"
        drawn = collect_pictures(
            study.config.pictures, pictures, drawn=(options.pop("drawn", DRAWN), seed), progress=study.progress
        )
        write_json(captions, drawn_captions(drawn, read_texts(text / f"{NATURAL}.jsonl"), seed))
    if options.get("image_tower") == PACKAGE_TOWER:
        options["image_tower"] = image_tower(study.out / "tower")
    shutil.rmtree(folder / "clip", ignore_errors=True)  # a killed training begins again
    where = ["--captions", captions, "--out", folder / "clip", "--seed", seed]
    study.valm("clip", "train", pictures, *where, *as_options(options))


def _train(study: Study, name: str, arm: Arm, base: str, seed: int) -> None:
    """Trains an arm."""
    out, folder = study.seed_folder(seed) / name, study.kb_folder(seed, arm)
    retrieval, kb = folder / f"retrieval-{arm.corpus}", folder / KB_OTHERS
    if arm.made != TRAINED:
        _train_here(study, name, arm, base, seed)
        return
    study.valm(
        *("train", "--base", base, "--retrieval", retrieval, "--kb", kb),
        *(["--twin", arm.twin] if arm.twin else []),
        *(["--min-score", "auto", "--questions", folder / f"retrieval-{QUESTIONS}"] if arm.cut else []),
        *("--unfreeze", "block", "--cache-below", study.out / "below", "--out", out, "--resume"),
        *("--seed", seed, "--logging_steps", "1"),
        *as_options(study.config.training_settings(name)),
        *(["--allow-download"] if study.config.allow_download else []),
    )
    measured = read_json(out / RUN_FILE, "the note on a training", dict[str, Any]).get("numbers", {})
    _note_training(out, losses(out), measured | {"steps": best_step(out)})


def _train_here(study: Study, name: str, arm: Arm, base: str, seed: int) -> None:
    """Trains an arm that is no `valm train`; one that was killed begins again."""
    out, folder = study.seed_folder(seed) / name, study.kb_folder(seed, arm)
    shutil.rmtree(out, ignore_errors=True)
    retrieval = CorpusRetrieval.open(folder / f"retrieval-{arm.corpus}")
    kb = ImageKnowledgeBase.open(folder / KB_OTHERS)
    plan = study_plan(out, base, seed, study.out / "below", study.config.training_settings(name))
    if arm.made == LATE:
        done = train_late_fusion(plan, retrieval, kb, study.progress)
    else:
        text = study.seed_folder(seed) / "text"
        things = {thing.text for thing in load_memory_color(text / "validation.csv")}
        captions = Captions(kb, read_pictures(study.pictures), arm.tests[0] == COLORED_CAPTIONS, things)
        texts = read_texts(text / f"{arm.corpus}.jsonl")
        done = train_with_captions(plan, texts, retrieval, captions, study.progress)
    _note_training(out, done.losses(), done.model_numbers())


def _note_training(out: Path, losses: Sequence[float], numbers: dict[str, float]) -> None:
    """Notes the loss of each step and what was measured of a model, and removes the checkpoints, which are as large as
    the model."""
    write_json(out / TRAINING_FILE, {"losses": [round(loss, 4) for loss in losses], "numbers": numbers}, indent=None)
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


def losses(folder: Path) -> list[float]:
    """The loss of every step of the training whose last checkpoint is in `folder`."""
    return [entry["loss"] for entry in _last_state(folder)["log_history"] if "loss" in entry]


def best_step(folder: Path) -> int:
    """The step after which the training in `folder` has its model."""
    state = _last_state(folder)
    return state.get("best_global_step") or state["global_step"]


def _last_state(folder: Path) -> dict[str, Any]:
    states = sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"), key=lambda file: int(file.parent.name.split("-")[1]))
    return read_json(states[-1], "the state of a training", dict[str, Any])
