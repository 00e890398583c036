"""The scores of a seed: the questions for each arm, the rows of their answers, and the results file of all arms."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studies.color.captions import Captions, captioned
from studies.color.conditions import Conditions
from studies.color.config import (
    BASE,
    COLORED_CAPTIONS,
    DOSES,
    EXCHANGES,
    HELDOUT,
    VALIDATION,
    Arm,
    arm_of,
    of_curve,
)
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
from studies.color.study import STUDY_FILE, Study
from studies.color.text import read_texts
from valm.clip.clip import Clip
from valm.clip.tokenizer import own_tokenizer
from valm.evaluation.questions import Questions
from valm.evaluation.scorers import CausalScorer, digest
from valm.evaluation.sets import SETS, Item, find_file, load_memory_color
from valm.model.checkpoint import load, load_decoder
from valm.pictures.page import hardware, versions
from valm.store.files import read_json, writable_folder, write_json

# Sets with more items than this are asked only in the first test of each arm.
LARGE = 300
# The sets whose items' pictures are looked up.
LOOKED_UP = (VALIDATION, *COLOR_SETS)
VERSIONS = ("torch", "transformers", "open_clip_torch", "timm", "numpy")


class Scoring:
    """Asks the models of a seed. Data that several models need is computed once."""

    def __init__(self, study: Study, seed: int, base: str, pictures: Sequence[Picture]):
        self.study, self.seed, self.base, self.pictures = study, seed, base, pictures
        self.folder = study.seed_folder(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def things(self) -> list[Item]:
        """The validation objects."""
        return load_memory_color(self.folder / "text" / "validation.csv")

    @cached_property
    def missing(self) -> list[str]:
        """The tests whose data are missing: sets that do not filter the training text, and the captions."""
        wanted = [name for name in self.study.tests if name in SETS and name not in COLOR_SETS]
        return [name for name in wanted if find_file(name, self.study.data) is None] + (
            [CAPTIONS_KIND] if HELDOUT in self.study.tests and not flickr_captions(self.study.data) else []
        )

    @cached_property
    def names(self) -> list[str]:
        """The tests whose data exist, followed by the captions."""
        wanted = [*self.study.tests, *([CAPTIONS_KIND] if HELDOUT in self.study.tests else [])]
        return [name for name in wanted if name not in self.missing]

    def file(self, arm: str) -> Path:
        """The file in scores/ for an arm. Its name changes with the tests and with their contents."""
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

    @cached_property
    def conditions(self) -> Conditions:
        clip = Clip.load(self.study.clip(self.seed), device=self.device)
        images, pictures = self.study.config.images, self.study.pictures
        return Conditions(self.folder, clip, self.tokenizer, images, self.seed, self.pictures, pictures)

    @cached_property
    def small(self) -> dict[str, Questions]:
        """The sets with at most LARGE items."""
        return {name: one for name, one in self.asked.items() if len(one.items) <= LARGE}

    @cached_property
    def pictured(self) -> dict[str, np.ndarray]:
        """Whether the knowledge base contains a picture of each item, for the sets with some unpictured items."""
        return {
            of: np.array([bool(self.conditions.pictures_of(item)) for item in one.items])
            for of, one in self.asked.items()
            if of in COLOR_SETS[:2]
        }

    @cached_property
    def with_captions(self) -> dict[str, Questions]:
        """The sets of `small`, with the captions of the images of each question's last token before the question."""
        caption = Captions(self.conditions.kb, self.pictures)
        return {name: captioned(one, self.conditions["retrieved"], caption) for name, one in self.small.items()}

    def open(self, name: str) -> Any:
        """The model of an arm."""
        if name == BASE:
            return load_decoder(self.base).eval().to(self.device)
        return load(self.folder / name, device=self.device)[0]

    def write(self, name: str, file: Path) -> None:
        """Writes the rows of an arm."""
        study, scorer = self.study, CausalScorer(self.open(name), self.tokenizer, name)
        tests = self._tests(name)
        plain = [row for one in self.asked.values() for row in question_rows(self.tokenizer, one)]
        plain += [row for documents in self.texts.values() for row in text_rows(self.tokenizer, documents)]
        captioned = [one for test in tests if test.images == COLORED_CAPTIONS for one in test.asked.values()]
        behind = [row for one in captioned for row in question_rows(self.tokenizer, one)]
        for known in filter(None, (plain, behind)):  # most arms need only the first
            read_from_fusion(scorer.model, known, study.out / "below", progress=study.progress)
        say = partial(print, flush=True) if study.progress else _silent
        write_json(file, score_arm(name, scorer, tests, say, self.pictured), indent=None)
        del scorer
        gc.collect()

    def _tests(self, name: str) -> list[Evaluation]:
        """The evaluations of a training. A training of a curve has one, of the sets about the objects of the claims.
        Else the first test without captions asks all sets, the other tests ask the sets of `small`, and the tests of
        DOSES ask only the sets about the items whose pictures they remove. Exchanged images are for questions: with
        them, no text is read."""
        arm = arm_of(name)
        assert arm is not None
        if of_curve(name):
            of_claims = {of: one for of, one in self.asked.items() if of in (VALIDATION, *COLOR_SETS[:2])}
            return [Evaluation(arm.tests[0], of_claims, {}, self._retriever(arm, arm.tests[0]))]
        tests = []
        of_items = {of: one for of, one in self.small.items() if of in COLOR_SETS[:2]}
        whole = next(images for images in arm.tests if images != COLORED_CAPTIONS)
        for images in arm.tests:
            if images == COLORED_CAPTIONS:
                tests.append(Evaluation(images, self.with_captions, {}))
            elif images in DOSES:
                tests.append(Evaluation(images, of_items, {}, self.conditions[images]))
            else:
                asked, texts = self.asked if images == whole else self.small, {} if images in EXCHANGES else self.texts
                tests.append(Evaluation(images, asked, texts, self._retriever(arm, images)))
        return tests

    def _retriever(self, arm: Arm, images: str) -> Any:
        if images == "none":
            return None
        return self.conditions.blind if arm.twin == "blind" else self.conditions[images]

    def results(self, rows: dict[str, Path]) -> dict[str, Any]:
        """The results of the seed from the rows of its arms: a `SeedJson` with further notes."""
        study, folder = self.study, self.folder
        answers = [row for file in rows.values() for row in read_json(file, "the scores", list[dict[str, Any]])]
        asked, counts = self._asked()
        note = read_json(study.out / STUDY_FILE, "the note on a study", dict[str, Any], "run the study again")
        return {
            "study": study.config.name,
            "recipe": study.config.recipe,
            "config": study.config.to_json(),
            "seed": self.seed,
            "missing": self.missing,
            "asked": asked,
            "rows": [one for row in answers for one in ([row] if "hits" in row else counted(row, counts[row["of"]]))],
            "counts": read_json(folder / "text" / "counts.json", "the counts of the text", dict[str, Any]),
            "versions": versions(VERSIONS) | {"sources": " ".join(note["sources"])},
            "hardware": hardware(),
            "threads": torch.get_num_threads(),
        }

    def _asked(self) -> tuple[list[AskedJson], dict[str, dict[str, Counted]]]:
        """The questions asked, and what each measure counts in the answers to each set."""
        asked: list[AskedJson] = []
        counts, conditions = {}, self.conditions
        for of, one in self.asked.items():
            colors = [conditions.colors_of(item) for item in one.items if of in LOOKED_UP[:3]]  # ViComTe has many
            shown = [bool(conditions.pictures_of(item)) for item in one.items if of in LOOKED_UP]
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
                        "pixels": [colors[item]["retrieved"] or "" for item in items if colors],
                    }
                )
        nothing: Any = {"measure": NATS, "answers": [], "pictured": [], "pixels": []}
        for of, texts in self.texts.items():
            names = [f"{of} {number}" for number in range(len(texts))]
            tokens = [len(row) - 1 for row in text_rows(self.tokenizer, texts)]  # without the first token, begin
            asked.append(nothing | {"of": of, "items": names, "tries": tokens})
        return asked, counts


def _silent(line: str) -> None:
    pass


def _heldout(folder: Path, data: Path | None) -> dict[str, list[str]]:
    """Texts for perplexity by kind: the texts held out of training, and the captions of Flickr8k if `data` has them."""
    files = {file.stem.removeprefix("heldout-"): file for file in sorted(folder.glob("heldout-*.jsonl"))}
    found = {kind: read_texts(file) for kind, file in files.items()}
    captions = flickr_captions(data)
    return found | ({CAPTIONS_KIND: captions} if captions else {})
