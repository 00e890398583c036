"""A pretrained decoder of SmolLM2-135M's shape: plain, augmented, and trained from cached inputs of its fusion layer.

The weights are random: speed does not depend on them, and so the rows need no download. Malloc as in bench_training.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import valm
from valm.training.cache_below import FUSION_INPUT, cache_below
from valm.training.limited_softmax import LimitedSoftmax

K, DIM, LAYER = 4, 512, 28
BATCH, TOKENS = 4, 128
# Of a training step: short documents, and the tokens that a small corpus has.
DOCUMENTS, DOCUMENT_TOKENS, CORPUS_TOKENS = 24, 32, 4000

pytestmark = pytest.mark.timeout(1800)


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=49152, **sizes, **heads, max_position_embeddings=8192)
    return LlamaForCausalLM(config).eval()


def images(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """K images a token, each of which stands at two of them."""
    generator = torch.Generator().manual_seed(0)
    several = torch.arange(batch * tokens * K // 2).repeat(2)
    index = several[torch.randperm(len(several), generator=generator)].reshape(batch, tokens, K)
    return {"image_pool": torch.randn(len(several) // 2, DIM, generator=generator), "image_index": index}


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["plain", "augmented, images given"])
@pytest.mark.parametrize("threads", [1, 2])
def bench_forward(measure, threads, name):
    model: Any = decoder()
    arguments: dict[str, Any] = {"input_ids": torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS), "use_cache": False}
    if name != "plain":
        valm.augment(model, DIM, K, layer=LAYER, logit_bias=0.0)
        arguments |= images(BATCH, TOKENS)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(**arguments).logits

    def check(logits: torch.Tensor) -> None:
        assert logits.shape == (BATCH, TOKENS, 49152) and logits.isfinite().all()

    with threads_of_torch(threads):
        group = (
            f"SmolLM2-135M's shape, forward, B{BATCH} T{TOKENS}, K {K}, U {BATCH * TOKENS * K // 2}, {threads} threads"
        )
        measure(group=group, name=name, function=forward, check=check, rounds=10)


STEPS = ("from the tokens", "cache_below", "cache_below, limit_softmax")


@pytest.mark.parametrize("name", STEPS)
def bench_training_step(measure, name, tmp_path):
    """A step that trains the fusion layer, 28 of 30, and what is new in it."""
    model: Any = decoder()
    valm.augment(model, DIM, K, layer=LAYER, logit_bias=0.0, unfreeze="block")
    shape = (DOCUMENTS, DOCUMENT_TOKENS)
    random = np.random.default_rng(0)
    ids = random.choice(CORPUS_TOKENS, shape)
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids), **images(*shape)}
    documents = [{"input_ids": one} for one in ids]
    if name != STEPS[0]:
        cached = cache_below(model, documents, tmp_path, progress=False)
        batch[FUSION_INPUT] = torch.from_numpy(np.stack([cached[row][FUSION_INPUT] for row in range(DOCUMENTS)]))
    if name == STEPS[2]:
        LimitedSoftmax(model, [{"input_ids": np.arange(CORPUS_TOKENS)}])
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def check(loss: torch.Tensor) -> None:
        assert 7 < loss < 12  # log(4000) = 8.3, log(49152) = 10.8

    with threads_of_torch(1):
        group = (
            f"SmolLM2-135M's shape, training step of layer {LAYER} of 30, B{DOCUMENTS} T{DOCUMENT_TOKENS}, K {K}, "
            f"{CORPUS_TOKENS:,} of 49,152 tokens, 1 thread"
        )
        measure(group=group, name=name, function=step, check=check, rounds=7)
