"""Runs a study from pictures to results. Each stage is a command of this package, or a few lines of `studies.color`.

All seeds share OUT/pictures. The files of a seed are in OUT/seed-N, or in OUT itself if the study has one seed:

    text/  clip/  kb-others/  kb/  retrieval-train/  twin/  valm/  blind/ …  results.json
"""

from __future__ import annotations

import csv
import gc
import platform
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from studies.color.clip import check, image_tower
from studies.color.conditions import Conditions
from studies.color.config import (
    ARMS,
    HELDOUT,
    KB,
    KB_NOISE,
    KB_OTHERS,
    VALIDATION,
    Arm,
    StudyConfig,
)
from studies.color.pictures import Picture, collect_pictures, read_pictures
from studies.color.questions import (
    CAPTIONS_KIND,
    COLOR_SETS,
    flickr_captions,
    item_names,
    set_questions,
    validation_questions,
)
from studies.color.scoring import compact, question_rows, read_from_fusion, score_arm, text_rows
from studies.color.text import study_text
from studies.color.words import Names
from studies.demo.run import hardware
from studies.stages import Stages
from valm.clip.clip import Clip
from valm.corpus.parts import read_documents
from valm.errors import ValmError
from valm.evaluation.color import load_memory_color
from valm.evaluation.questions import Questions
from valm.evaluation.scorers import CausalScorer
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import load
from valm.model.smollm2 import PACKAGE, convert_smollm2
from valm.retrieval.note import RetrievalNote
from valm.store.files import read_json, writable_folder, write_json
from valm.training.image_trainer import STATE_FILE
from valm_kernels.atomic_files import remove_folder

RESULTS_FILE = "results.json"
STUDY_FILE = "study.json"
LOSSES_FILE = "losses.json"
# A value of `image_tower` in a study's `clip`; any other value is a CLIP for `valm clip train --image-tower`.
PACKAGE_TOWER = "efficientnet-lite0"
# Sets with more items than this are asked only in the first test of each arm.
LARGE = 300
VERSIONS = ("torch", "transformers", "open_clip_torch", "timm", "numpy")
# Options of `valm train` and `valm clip train`; any other name is a field of TrainingArguments.
OWN_OPTIONS = {
    "batch_size",
    "cache_images",
    "context",
    "fusion_lr",
    "image_tower",
    "limit_softmax",
    "logit_bias",
    "max_logit_scale",
}
# Runs a command line of `valm` and returns its exit status.
Command = Callable[[list[str]], int]


@dataclass(frozen=True)
class Study:
    """A study with its folders and the command that runs its stages.

    Args:
        config: the study.
        out: folder of everything that it writes.
        command: `valm.cli.main`.
        data: folder of the test sets.
        validation: ask about validation things only.
        progress: print the stages and show progress bars.
    """

    config: StudyConfig
    out: Path
    command: Command
    data: Path | None
    validation: bool = False
    progress: bool = True

    @property
    def pictures(self) -> Path:
        return self.out / "pictures"

    @property
    def tests(self) -> list[str]:
        """The tests of the config, without the test sets if `validation`."""
        return [name for name in self.config.tests if not self.validation or name in (VALIDATION, HELDOUT)]

    def seed_folder(self, seed: int) -> Path:
        return self.out if len(self.config.seeds) == 1 else self.out / f"seed-{seed}"

    def valm(self, *arguments: object) -> None:
        """Runs `valm arguments`.

        Raises:
            ValmError: the command failed; it has printed why.
        """
        line = [str(argument) for argument in arguments]
        if self.progress:
            print(f"$ valm {shlex.join(line)}", flush=True)
        if self.command(line if self.progress else [*line, "--quiet"]) != 0:
            raise ValmError(f"this stage of the study failed: valm {shlex.join(line)}")


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
    return {seed: _run_seed(study, seed, base) for seed in seeds or config.seeds}


def _language_model(name: str, out: Path) -> str:
    """The value of `valm train --base` for `name`; PACKAGE is converted into the folder `out`, if not there yet."""
    if name != PACKAGE:
        return name
    if not (out / "config.json").is_file():
        convert_smollm2(out)
    return str(out)


def _note_study(study: Study) -> None:
    file = study.out / STUDY_FILE
    if file.is_file():
        before = read_json(file, "the note on a study", dict[str, Any], "choose another folder")
        one_seed = [study.config.to_json()["seeds"], before.get("config", {}).get("seeds")]
        # with one seed, the folder's name does not say which
        if before.get("recipe") != study.config.recipe or (1 in map(len, one_seed) and one_seed[0] != one_seed[1]):
            raise ValmError(f"{study.out} holds a study of other settings: choose another folder")
    write_json(file, {"recipe": study.config.recipe, "config": study.config.to_json()})


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
    clip = str(config.clip.get("pretrained", folder / "clip"))
    stage("text", lambda: _write_text(study, pictures, seed, folder / "text"))
    if "pretrained" not in config.clip:
        stage("clip", lambda: _train_clip(study, seed, folder))
    others, items = study.pictures / "others.csv", study.pictures / "items.csv"
    hub = ["--allow-download"] if config.allow_download else []
    table = ["--format", "csv"]
    stage("kb-others", lambda: study.valm("kb", "build", others, *table, "--clip", clip, "--out", folder / KB_OTHERS))
    stage("kb", lambda: study.valm("kb", "add", folder / KB_OTHERS, items, *table, "--out", folder / KB, *hub))
    arms = {name: ARMS[name] for name in config.arms}
    if any(arm.kb == KB_NOISE for arm in arms.values()):
        stage("kb-noise", lambda: _noise(study, folder, clip, seed))
    for corpus, kb in dict.fromkeys((arm.corpus, arm.kb) for arm in arms.values()):
        retrieval = folder / retrieval_name(corpus, kb)
        options = ("--kb", folder / kb, "--tokenizer", base, "-k", config.images, "--out", retrieval, *hub)
        text = folder / "text" / f"{corpus}.jsonl"
        stage(retrieval.name, partial(study.valm, "retrieve", text, *options))
    for name, arm in arms.items():
        stage(name, partial(_train, study, name, arm, folder, base, seed))
    # the stage has the arms and tests in its name, so that other ones are scored again
    tested = f"scores of {', '.join(config.arms)} on {', '.join(study.tests)}"
    results = folder / (f"{VALIDATION}-{RESULTS_FILE}" if study.validation else RESULTS_FILE)
    stage(tested, lambda: _score(study, seed, folder, clip, pictures, results))
    found = read_json(results, "the results", dict[str, Any], "run the study again")
    found["seconds"] = stage.seconds
    write_json(results, found, indent=None)
    return results


def retrieval_name(corpus: str, kb: str) -> str:
    return f"retrieval-{corpus}" + ("-noise" if kb == KB_NOISE else "")


def _write_text(study: Study, pictures: Sequence[Picture], seed: int, out: Path) -> None:
    names, heads = item_names(COLOR_SETS, study.data), item_names(COLOR_SETS[:2], study.data)
    study_text(study.config.text, pictures, names, seed=seed, head_noun_items=heads).write(out)


def _train_clip(study: Study, seed: int, folder: Path) -> None:
    options = dict(study.config.clip)
    if options.get("image_tower") == PACKAGE_TOWER:
        options["image_tower"] = image_tower(study.out / "tower")
    shutil.rmtree(folder / "clip", ignore_errors=True)  # a killed training begins again
    captions = ["--captions", folder / "text" / "captions.json"]
    study.valm(
        "clip", "train", study.pictures, *captions, "--out", folder / "clip", "--seed", seed, *as_options(options)
    )


def _noise(study: Study, folder: Path, clip: str, seed: int) -> None:
    """Builds a knowledge base of random unit vectors, as many as KB_OTHERS has images."""
    kb = ImageKnowledgeBase.open(folder / KB_OTHERS)
    vectors = folder / "noise-embeddings"
    for part in ("img_emb", "metadata"):
        (vectors / part).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).standard_normal((len(kb), kb.dim)).astype(np.float32)
    np.save(vectors / "img_emb" / "img_emb_0.npy", noise)
    names = pa.table({"image_path": [f"noise-{row}" for row in range(len(kb))], "caption": [""] * len(kb)})
    pq.write_table(names, vectors / "metadata" / "metadata_0.parquet")
    study.valm("kb", "build", vectors, "--format", "embeddings", "--clip", clip, "--out", folder / KB_NOISE)


def _train(study: Study, name: str, arm: Arm, folder: Path, base: str, seed: int) -> None:
    """Trains an arm. An arm that retrieves then gets the note that its images are in KB."""
    kb = folder / arm.kb
    study.valm(
        *("train", "--base", base, "--retrieval", folder / retrieval_name(arm.corpus, arm.kb), "--kb", kb),
        *(["--twin", arm.twin] if arm.twin else []),
        *("--unfreeze", "block", "--cache-below", study.out / "below", "--out", folder / name, "--resume"),
        *("--seed", seed, "--logging_steps", "1"),
        *as_options(study.config.training),
        *(["--allow-download"] if study.config.allow_download else []),
    )
    # the model has the weights; the last checkpoint is as large, and only its losses are needed
    write_json(folder / name / LOSSES_FILE, losses(folder / name))
    for checkpoint in (folder / name).glob("checkpoint-*"):
        remove_folder(checkpoint)
    if arm.twin is None:
        RetrievalNote.of_knowledge_base(ImageKnowledgeBase.open(folder / KB), "eot").write(folder / name)


def as_options(settings: dict[str, Any]) -> list[str]:
    """{"batch_size": 24, "limit_softmax": True} as ["--batch-size", "24", "--limit-softmax"]."""
    options = []
    for name, value in settings.items():
        if value is False and name in OWN_OPTIONS:
            continue
        options.append(f"--{name.replace('_', '-') if name in OWN_OPTIONS else name}")
        if value is not True:
            options.append(str(value))
    return options


def losses(folder: Path) -> list[float]:
    """The loss of every step of the training whose last checkpoint is in `folder`."""
    states = sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"), key=lambda file: int(file.parent.name.split("-")[1]))
    history = read_json(states[-1], "the state of a training", dict[str, Any])["log_history"]
    return [round(entry["loss"], 4) for entry in history if "loss" in entry]


def _score(study: Study, seed: int, folder: Path, clip_source: str, pictures: Sequence[Picture], results: Path) -> None:
    config = study.config
    things = load_memory_color(folder / "text" / "validation.csv")
    asked: dict[str, Questions] = {
        name: validation_questions(things) if name == VALIDATION else set_questions(name, study.data)
        for name in study.tests
        if name != HELDOUT
    }
    texts = _heldout(folder / "text", study.data) if HELDOUT in study.tests else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip = Clip.load(clip_source, device=device)
    conditions: Conditions | None = None
    known: list[list[int]] | None = None
    rows: list[dict[str, Any]] = []

    def say(line: str) -> None:
        if study.progress:
            print(f"  {line}", flush=True)

    for name in config.arms:
        arm = ARMS[name]
        model, tokenizer = load(folder / name, device=device)
        conditions = conditions or Conditions(folder, clip, tokenizer, config.images, seed, pictures, study.pictures)
        if known is None:
            known = [row for one in asked.values() for row in question_rows(tokenizer, one)]
            known += [row for documents in texts.values() for row in text_rows(tokenizer, documents)]
        read_from_fusion(model, known, study.out / "below", progress=study.progress)
        scorer = CausalScorer(model, tokenizer, name)
        tests = {images: _retriever(conditions, arm, images) for images in arm.tests}
        rows += score_arm(name, scorer, tests, asked, texts, large=LARGE, say=say)
        del model, scorer
        gc.collect()
    assert conditions is not None
    write_json(
        results,
        {
            "study": config.name,
            "recipe": config.recipe,
            "config": config.to_json(),
            "seed": seed,
            "sets": {name: _about(one, conditions) for name, one in asked.items()},
            "rows": rows,
            "losses": {name: read_json(folder / name / LOSSES_FILE, "the losses", list[float]) for name in config.arms},
            "clip": check(Path(clip_source), conditions.kb, pictures, things),
            "counts": read_json(folder / "text" / "counts.json", "the counts of the text", dict[str, Any]),
            "pictures": {"all": len(conditions.kb), "of items": len(conditions.kb) - _images_in(folder / KB_OTHERS)},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
            "hardware": hardware(),
            "threads": torch.get_num_threads(),
        },
    )


def _images_in(kb: Path) -> int:
    return len(ImageKnowledgeBase.open(kb))


def _retriever(conditions: Conditions, arm: Arm, images: str) -> Any:
    if images == "none":
        return None
    return conditions.of_blind(images) if arm.twin == "blind" else conditions[images]


def _heldout(folder: Path, data: Path | None) -> dict[str, list[str]]:
    """Texts for perplexity, by kind: those held out of training, and the captions of Flickr8k if `data` has it."""
    files = {file.stem.removeprefix("heldout-"): file for file in sorted(folder.glob("heldout-*.jsonl"))}
    found = {kind: list(read_documents([file], column="text")) for kind, file in files.items()}
    captions = flickr_captions(data)
    return found | ({CAPTIONS_KIND: captions} if captions else {})


def _about(asked: Questions, conditions: Conditions) -> dict[str, Any]:
    """Items, candidates and right answers of a set, and for sets about colours the colours of the items' pictures."""
    found: dict[str, Any] = {
        "items": list(asked.items),
        "prompts": list(asked.prompts),
        "candidates": list(asked.candidates),
        "right": compact(np.array(asked.right)),
    }
    if asked.task in (VALIDATION, *COLOR_SETS):
        found["pictured"] = [bool(conditions.pictures_of(item)) for item in asked.items]
    if asked.task in (VALIDATION, *COLOR_SETS[:2]):
        found["colors"] = [conditions.colors_of(item) for item in asked.items]
    return found
