"""Documents, a knowledge base in memory and a tokenizer for tests that train."""

import numpy as np
import torch
from transformers import PrinterCallback

from tests.valm.models import tiny_config
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.model.gpt2 import VaLMForCausalLM
from valm.training.train import METHODS, trainer, training_arguments

TEXTS = [
    f"the color of the {thing} is {color} ." for thing in ("sun", "sea", "cat", "leaf") for color in ("red", "blue")
]
TOKENIZER = prune_tokenizer(clip_tokenizer(), TEXTS)


class Vectors:
    """The part of an ImageKnowledgeBase that the collator uses."""

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
    """A tiny VaLM for TOKENIZER, equal in every call."""
    torch.manual_seed(0)
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    return VaLMForCausalLM(tiny_config(vocab_size=len(TOKENIZER), **ids, **arguments))


# Arguments of `trainer` that `new_trainer` passes on.
OPTIONS = ("row_length", "compute_loss_func", *METHODS)


def new_trainer(folder, *, model=None, kb="default", dataset=None, eval_dataset=None, tokenizer=TOKENIZER, **fields):
    """A trainer of `new_model` on `documents`: six steps of three documents, with every loss logged and nothing
    printed.

    fields: training arguments, and OPTIONS.
    """
    defaults = {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 3e-3, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    options = {name: fields.pop(name) for name in OPTIONS if name in fields}
    made = trainer(
        new_model() if model is None else model,
        documents() if dataset is None else dataset,
        Vectors() if kb == "default" else kb,
        tokenizer=tokenizer,
        arguments=training_arguments(folder, **(defaults | fields)),
        eval_dataset=eval_dataset,
        **options,
    )
    made.remove_callback(PrinterCallback)
    return made


def trained(folder, *, resume=None, **arguments):
    """A `new_trainer` after training, or after a resume from a checkpoint (True: the newest)."""
    made = new_trainer(folder, **arguments)
    made.train(resume_from_checkpoint=resume)
    return made
