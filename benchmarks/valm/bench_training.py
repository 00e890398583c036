"""A training step of VaLM on a retrieved corpus, compared with the text-only baseline GPT-2*, both of base size.

A step is the collator, forward, backward, clipping and AdamW, in float32. With --device cuda it runs under bfloat16
autocast with a larger batch. Each image of the batch belongs to two tokens. One more row uses a score threshold
(`min_score`) that removes the images of half of the tokens. As in bench_retrieval.py, let malloc keep freed memory:
MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sizes import sized
from benchmarks.valm.inputs import IDS, valm_model
from benchmarks.valm_kernels import roofline
from valm.clip.tokenizer import clip_tokenizer
from valm.training.collate import Collator
from valm.training.data import with_min_score

TOKENS, K, DIM = sized((512, 4, 768), (64, 4, 16))
BATCH = {"cpu": 2, "cuda": 16}
STORED = sized(100_000, 5_000)  # in the knowledge base

pytestmark = pytest.mark.timeout(1800)


class Vectors:
    """The part of a knowledge base that the collator uses."""

    def __init__(self) -> None:
        self.vectors = np.random.default_rng(0).standard_normal((STORED, DIM), dtype=np.float32).astype(np.float16)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        return self.vectors[ids]


def images_of(batch: int) -> int:
    """Different images in a batch."""
    return batch * TOKENS * K // 2


def retrieved_documents(batch: int) -> list[dict[str, np.ndarray]]:
    """`batch` documents of TOKENS tokens with K images each, as `CorpusRetrieval` returns them."""
    random = np.random.default_rng(1)
    ids = random.integers(0, IDS["vocab_size"] - 2, (batch, TOKENS)).astype(np.int32)
    ids[:, 0] = IDS["bos_token_id"]
    several = random.permutation(STORED)[: images_of(batch)]
    images = random.permutation(np.concatenate([several, several])).reshape(batch, TOKENS, K)
    best = random.random((batch, TOKENS, 1), dtype=np.float32)
    parts = zip(ids, images, np.broadcast_to(best, images.shape), strict=True)
    return [{"input_ids": one, "image_ids": found, "image_scores": scores} for one, found, scores in parts]


@pytest.mark.parametrize("name", ["GPT-2*", "VaLM", "VaLM, images at half of the tokens"])
def bench_step(measure, device, name):
    batch, min_score = BATCH[device.type], 0.5 if "half" in name else None
    # flash attention on CPU has no dropout
    model = valm_model(DIM, 0 if name == "GPT-2*" else K, attn_pdrop=0.0).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kb: Any = None if name == "GPT-2*" else Vectors()
    collate = Collator(clip_tokenizer(), kb, TOKENS)  # as `valm train`
    documents = with_min_score(retrieved_documents(batch), min_score)
    if kb:
        seeing = float((collate([*documents])["image_index"] >= 0).float().mean())
        assert abs(seeing - (1.0 if min_score is None else 1 - min_score)) < 0.1

    def step() -> torch.Tensor:
        inputs = {name: tensor.to(device) for name, tensor in collate([*documents]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def check(loss: torch.Tensor) -> None:
        assert 5 < loss < 12  # log(49408) = 10.8 before the first step

    how = f"{torch.get_num_threads()} threads" if device.type == "cpu" else "bfloat16"
    measure(
        group=f"training step, B{batch} T{TOKENS}, GPT-2 base size, K {K}, U {images_of(batch)}, {how}",
        name=name,
        function=step,
        check=check,
        arithmetic=roofline.transformer_s(model.num_parameters(), batch * TOKENS, passes=3),
    )
