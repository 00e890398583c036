"""Documents, a knowledge base in memory and a tokenizer for tests that train."""

import numpy as np
import torch
from transformers import PrinterCallback

from tests.valm.models import tiny_config
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.model.gpt2 import VaLMForCausalLM
from valm.training.train import trainer, training_arguments

TEXTS = [
    f"the color of the {thing} is {color} ." for thing in ("sun", "sea", "cat", "leaf") for color in ("red", "blue")
]
TOKENIZER = prune_tokenizer(clip_tokenizer(), TEXTS)


class Vectors:
    """What the collator needs of an ImageKnowledgeBase."""

    dim = 24

    def __init__(self, count=40):
        self.vectors = np.random.default_rng(0).standard_normal((count, self.dim)).astype(np.float16)

    def gather(self, ids):
        if len(ids) and ids.max() >= len(self.vectors):
            raise IndexError(f"image ids go from 0 to {len(self.vectors) - 1}, got {ids.max()}")
        return self.vectors[ids]


class Read(list):
    """Documents that remember which were read."""

    def __init__(self, items):
        super().__init__(items)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def documents(num_images=3, count=8, seed=0):
    """`count` documents with random pictures, some slots empty."""
    random = np.random.default_rng(seed)
    made = []
    for text in (TEXTS * (count // len(TEXTS) + 1))[:count]:
        ids = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id]
        images = random.integers(0, 40, (len(ids), num_images))
        images[random.random(images.shape) < 0.2] = -1
        made.append({"input_ids": ids, "image_ids": images})
    return made


def new_model(**arguments):
    """A tiny VaLM that reads with TOKENIZER, the same in every call."""
    torch.manual_seed(0)
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    return VaLMForCausalLM(tiny_config(vocab_size=len(TOKENIZER), **ids, **arguments))


def new_trainer(folder, *, model=None, kb="default", dataset=None, eval_dataset=None, image_dropout=0.0, **fields):
    """A trainer of `new_model` on `documents`: six steps of three, every loss logged and nothing printed."""
    defaults = {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 3e-3, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    made = trainer(
        new_model() if model is None else model,
        documents() if dataset is None else dataset,
        Vectors() if kb == "default" else kb,
        tokenizer=TOKENIZER,
        arguments=training_arguments(folder, **(defaults | fields)),
        eval_dataset=eval_dataset,
        image_dropout=image_dropout,
    )
    made.remove_callback(PrinterCallback)
    return made
