"""Trains a small CLIP by `valm.training.clip`, on random views of drawings and generated captions."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerFast

from studies.demo.corpus import caption
from studies.demo.things import Thing, drawing_tensor, random_views
from valm.clip.clip import Clip
from valm.training.clip import SMALL_CONFIG, new_clip, train_clip
from valm.training.clip_plan import SMALL, SMALL_MAX_LOGIT_SCALE

IMAGE_SIZE = SMALL_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
DRAWING_SIZE = 96  # the resolution that views are taken from


def train_demo_clip(
    things: list[Thing],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    progress: bool = True,
) -> tuple[Clip, list[float]]:
    """Trains a small CLIP. Each step samples new views and new captions of different objects.

    Returns:
        The CLIP, and the loss of each step.
    """
    torch.manual_seed(seed)
    clip = new_clip(SMALL, tokenizer=tokenizer)
    clip.name = "valm-demo-clip"
    losses = train_clip(
        clip,
        _captioned_views(things, min(batch_size, len(things)), seed),
        steps=steps,
        lr=lr,
        max_logit_scale=SMALL_MAX_LOGIT_SCALE,
        progress="CLIP" if progress else None,
    )
    return clip, losses


def _captioned_views(things: list[Thing], size: int, seed: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless batches: random views of different objects, and their captions."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    drawings = drawing_tensor(things, DRAWING_SIZE)
    queue: list[int] = []
    while True:
        if len(queue) < size:
            queue = torch.randperm(len(things), generator=generator).tolist()
        batch, queue = queue[:size], queue[size:]
        images = pixels(random_views(drawings[batch], IMAGE_SIZE, generator))
        yield images, [caption(things[i].name, rng) for i in batch]


def pixels(views: torch.Tensor) -> torch.Tensor:
    """Views (N, 3, H, W) in [0, 1] as the vision tower takes them."""
    return views * 2 - 1
