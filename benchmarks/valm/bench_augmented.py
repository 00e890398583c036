"""A pretrained decoder of SmolLM2-135M's shape: plain, augmented, and trained from cached inputs of its fusion layer.

The weights are random, because speed does not depend on them, so nothing is downloaded. Malloc as in bench_training.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import valm
from benchmarks.sizes import sized
from benchmarks.valm.inputs import smollm2
from valm.training.cache_below import FUSION_INPUT, cache_below
from valm.training.limited_softmax import LimitedSoftmax

K, DIM, LAYER = sized((4, 512, 28), (4, 16, 1))
BATCH, TOKENS = sized((4, 128), (2, 8))
# Sizes of a training step: short documents, and the vocabulary of a small corpus.
DOCUMENTS, DOCUMENT_TOKENS, CORPUS_TOKENS = sized((24, 32, 4000), (4, 8, 4000))

pytestmark = pytest.mark.timeout(1800)


def images(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """K images per token; each image belongs to two tokens."""
    generator = torch.Generator().manual_seed(0)
    several = torch.arange(batch * tokens * K // 2).repeat(2)
    index = several[torch.randperm(len(several), generator=generator)].reshape(batch, tokens, K)
    return {"image_pool": torch.randn(len(several) // 2, DIM, generator=generator), "image_index": index}


@pytest.mark.parametrize("name", ["plain", "augmented, images given"])
def bench_forward(measure, name):
    model: Any = smollm2()
    arguments: dict[str, Any] = {"input_ids": torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS), "use_cache": False}
    if name != "plain":
        valm.augment(model, DIM, K, layer=LAYER, logit_bias=0.0)
        arguments |= images(BATCH, TOKENS)

    def check(logits: torch.Tensor) -> None:
        assert logits.shape == (BATCH, TOKENS, 49152) and logits.isfinite().all()

    measure(
        group=f"SmolLM2-135M's shape, forward, B{BATCH} T{TOKENS}, K {K}, U {BATCH * TOKENS * K // 2}",
        name=name,
        function=torch.no_grad()(lambda: model(**arguments).logits),
        check=check,
    )


STEPS = ("from the tokens", "cache_below", "cache_below, limit_softmax")


@pytest.mark.parametrize("name", STEPS)
def bench_training_step(measure, name, tmp_path):
    """A step that trains the fusion layer, 28 of 30, with its new parts."""
    model: Any = smollm2()
    valm.augment(model, DIM, K, layer=LAYER, logit_bias=0.0)
    model.model.layers[LAYER].requires_grad_(True)
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

    measure(
        group=f"SmolLM2-135M's shape, training step of layer {LAYER} of 30, B{DOCUMENTS} T{DOCUMENT_TOKENS}, K {K}, "
        f"{CORPUS_TOKENS:,} of 49,152 tokens",
        name=name,
        function=step,
        check=check,
    )
