"""The scores of a seed: what is asked of which arm, its rows, and the results file of all arms."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from studies.color.captions import Captions, captioned
from studies.color.conditions import Conditions
from studies.color.config import (
    ARMS,
    BASE,
    CAPTIONS,
    COLORED_CAPTIONS,
    CUTS,
    HELDOUT,
    KB_OTHERS,
    LATE,
    VALIDATION,
    Arm,
)
from studies.color.late_fusion import load_late_fusion
from studies.color.pictures import Picture
from studies.color.questions import (
    CAPTIONS_KIND,
    COLOR_SETS,
    flickr_captions,
    set_questions,
    validation_questions,
)
from studies.color.results import NATS, AskedJson
from studies.color.scoring import (
    Counted,
    Evaluation,
    counted,
    measures,
    question_rows,
    read_from_fusion,
    score_arm,
    text_rows,
)
from studies.color.study import QUESTIONS, STUDY_FILE, TRAINING_FILE, Study, Training
from studies.color.text import read_texts
from studies.color.training import FUSION_LAYER
from studies.demo.run import hardware, versions
from valm.clip.clip import Clip
from valm.clip.tokenizer import own_tokenizer
from valm.corpus.min_score import find_min_score
from valm.evaluation.questions import Questions
from valm.evaluation.scorers import CausalScorer, digest
from valm.evaluation.sets import SETS, Item, find_file, load_memory_color
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.augment import augment
from valm.model.checkpoint import load, load_decoder
from valm.store.files import read_json, writable_folder, write_json

# Sets with more items than this are asked only in the first test of each arm.
LARGE = 300
WITH_CAPTIONS = (CAPTIONS, COLORED_CAPTIONS)
VERSIONS = ("torch", "transformers", "open_clip_torch", "timm", "numpy")


class Scoring:
    """Asks the models of a seed. What several of them need is made once."""

    def __init__(self, study: Study, seed: int, base: str, pictures: Sequence[Picture]):
        self.study, self.seed, self.base, self.pictures = study, seed, base, pictures
        self.folder = study.seed_folder(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._conditions: dict[Path, Conditions] = {}
        self._with_captions: dict[str, dict[str, Questions]] = {}

    @cached_property
    def things(self) -> list[Item]:
        """The validation things."""
        return load_memory_color(self.folder / "text" / "validation.csv")

    @cached_property
    def missing(self) -> list[str]:
        """What is to be asked and the data lack: sets that the text is not filtered by, and the captions."""
        wanted = [name for name in self.study.tests if name in SETS and name not in COLOR_SETS]
        return [name for name in wanted if find_file(name, self.study.data) is None] + (
            [CAPTIONS_KIND] if HELDOUT in self.study.tests and not flickr_captions(self.study.data) else []
        )

    @cached_property
    def names(self) -> list[str]:
        """What is asked: the tests that the data have, and after them the captions."""
        wanted = [*self.study.tests, *([CAPTIONS_KIND] if HELDOUT in self.study.tests else [])]
        return [name for name in wanted if name not in self.missing]

    def file(self, arm: str) -> Path:
        """The file in scores/ of what is asked of an arm: of other questions, and of others' contents, another one."""
        key = digest([self.names, self._contents])[:8]
        return writable_folder(self.folder / "scores") / f"{arm}-{key}.json"

    @cached_property
    def _contents(self) -> str:
        return digest([[asdict(one) for one in self.asked.values()], self.texts])

    @cached_property
    def asked(self) -> dict[str, Questions]:
        return {
            name: validation_questions(self.things) if name == VALIDATION else set_questions(name, self.study.data)
            for name in self.names
            if name not in (HELDOUT, CAPTIONS_KIND)
        }

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        return _heldout(self.folder / "text", self.study.data) if HELDOUT in self.study.tests else {}

    @cached_property
    def tokenizer(self) -> Any:
        return own_tokenizer(self.base)

    def conditions(self, arm: Arm) -> Conditions:
        """The retrievers with the CLIP of an arm."""
        folder = self.study.kb_folder(self.seed, arm)
        if folder not in self._conditions:
            clip = Clip.load(self.study.clip(folder), device=self.device)
            images, pictures = self.study.config.images, self.study.pictures
            self._conditions[folder] = Conditions(
                folder, clip, self.tokenizer, images, self.seed, self.pictures, pictures
            )
        return self._conditions[folder]

    def with_captions(self, images: str, asked: dict[str, Questions]) -> dict[str, Questions]:
        """Questions, before each the captions of the images that its last token retrieves."""
        if images not in self._with_captions:
            conditions = self.conditions(ARMS["base"])
            caption = Captions(conditions.kb, self.pictures, images == COLORED_CAPTIONS)
            self._with_captions[images] = {
                name: captioned(one, conditions["retrieved"], caption) for name, one in asked.items()
            }
        return self._with_captions[images]

    def open(self, name: str) -> Any:
        """The model of an arm."""
        arm, config = ARMS[name], self.study.config
        if arm.made == BASE:  # the twin before its training, which reads the same hidden states
            return augment(load_decoder(self.base), 1, 0, unfreeze="block").eval().to(self.device)
        if arm.made == LATE:
            dim = self.conditions(arm).kb.dim
            return load_late_fusion(self.folder / name, self.base, dim, config.images).to(self.device)
        return load(self.folder / name, device=self.device)[0]

    def write(self, name: str, file: Path) -> None:
        """Writes the rows of an arm."""
        arm, study = ARMS[name], self.study
        scorer = CausalScorer(self.open(name), self.tokenizer, name)
        tests = self._tests(arm)
        plain = [row for one in self.asked.values() for row in question_rows(self.tokenizer, one)]
        plain += [row for documents in self.texts.values() for row in text_rows(self.tokenizer, documents)]
        ordered = sorted(tests, key=lambda test: test.images)  # one file for all arms, whichever they ask first
        captioned = [one for test in ordered if test.images in WITH_CAPTIONS for one in test.asked.values()]
        behind = [row for one in captioned for row in question_rows(self.tokenizer, one)]
        for known in filter(None, (plain, behind)):  # of which most arms need the first alone
            layer = FUSION_LAYER if arm.made == LATE else None
            read_from_fusion(scorer.model, known, study.out / "below", layer=layer, progress=study.progress)
        say = partial(print, flush=True) if study.progress else _silent
        write_json(file, score_arm(name, scorer, tests, say), indent=None)
        del scorer
        gc.collect()

    def _tests(self, arm: Arm) -> list[Evaluation]:
        """All sets are asked in the first test without captions, and those that are not LARGE in the others."""
        tests = []
        small = {name: one for name, one in self.asked.items() if len(one.items) <= LARGE}
        whole = next(images for images in arm.tests if images not in WITH_CAPTIONS)
        for images in arm.tests:
            if images in WITH_CAPTIONS:
                tests.append(Evaluation(images, self.with_captions(images, small), {}))
                continue
            retriever = None
            if images != "none":
                conditions = self.conditions(arm)
                blind = arm.twin == "blind"
                retriever = conditions.of_blind(images) if blind else conditions[CUTS.get(images, images)]
            cut = self.min_score(arm) if images in CUTS else None
            tests.append(Evaluation(images, self.asked if images == whole else small, self.texts, retriever, cut))
        return tests

    def min_score(self, arm: Arm) -> float:
        """Below it a token sees no images, in the tests with a cut."""
        folder, conditions = self.study.kb_folder(self.seed, arm), self.conditions(arm)
        questions = folder / f"retrieval-{QUESTIONS}"
        kb, query = ImageKnowledgeBase.open(folder / KB_OTHERS), conditions.encoder.query
        return find_min_score(kb, query, self.tokenizer, None, questions=questions)

    def results(self, rows: dict[str, Path]) -> dict[str, Any]:
        """The results of the seed, from the rows of its arms: a `SeedJson`, and what else is worth keeping."""
        study, folder = self.study, self.folder
        conditions = self.conditions(ARMS[next(iter(rows))])
        answers = [row for file in rows.values() for row in read_json(file, "the scores", list[dict[str, Any]])]
        asked, counts = self._asked(conditions)
        trained = {
            name: read_json(folder / name / TRAINING_FILE, "the numbers of a training", Training)
            for name in rows
            if ARMS[name].made != BASE
        }
        note = read_json(study.out / STUDY_FILE, "the note on a study", dict[str, Any], "run the study again")
        return {
            "study": study.config.name,
            "recipe": study.config.recipe,
            "config": study.config.to_json(),
            "seed": self.seed,
            "missing": self.missing,
            "asked": asked,
            "rows": [one for row in answers for one in ([row] if "hits" in row else counted(row, counts[row["of"]]))],
            "losses": {name: one["losses"] for name, one in trained.items()},
            "training": {name: one["numbers"] for name, one in trained.items()},
            "counts": read_json(folder / "text" / "counts.json", "the counts of the text", dict[str, Any]),
            "versions": versions(VERSIONS) | {"sources": " ".join(note["sources"])},
            "hardware": hardware(),
            "threads": torch.get_num_threads(),
        }

    def _asked(self, conditions: Conditions) -> tuple[list[AskedJson], dict[str, dict[str, Counted]]]:
        """What was asked, and what is counted in the answers to each set. The colours of pictures are looked up where
        the images are exchanged."""
        asked: list[AskedJson] = []
        counts = {}
        for of, one in self.asked.items():
            colors = [conditions.colors_of(item) for item in one.items if of in (VALIDATION, *COLOR_SETS[:2])]
            shown = [bool(conditions.pictures_of(item)) for item in one.items if of in (VALIDATION, *COLOR_SETS)]
            right = [one.candidates[row[0]] if len(set(row)) == 1 else "" for row in one.right]
            counts[of] = measures(one, colors)
            for measure, (items, _) in counts[of].items():
                asked.append(
                    {
                        "of": of,
                        "measure": measure,
                        "items": [one.items[item] for item in items],
                        "tries": [len(one.right[item]) for item in items],
                        "answers": [right[item] for item in items],
                        "pictured": [shown[item] for item in items if shown],
                    }
                )
        for of, texts in self.texts.items():
            names = [f"{of} {number}" for number in range(len(texts))]
            tokens = [len(row) - 1 for row in text_rows(self.tokenizer, texts)]  # the first is begin
            asked.append({"of": of, "measure": NATS, "items": names, "tries": tokens, "answers": [], "pictured": []})
        return asked, counts


def _silent(line: str) -> None:
    pass


def _heldout(folder: Path, data: Path | None) -> dict[str, list[str]]:
    """Texts for perplexity, by kind: those held out of training, and the captions of Flickr8k if `data` has it."""
    files = {file.stem.removeprefix("heldout-"): file for file in sorted(folder.glob("heldout-*.jsonl"))}
    found = {kind: read_texts(file) for kind, file in files.items()}
    captions = flickr_captions(data)
    return found | ({CAPTIONS_KIND: captions} if captions else {})
