"""A small CLIP trained the ordinary way: pictures with captions, open_clip's model class and its contrastive loss."""

from __future__ import annotations

import math
import random

import torch
from open_clip.loss import ClipLoss
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange
from transformers import PreTrainedTokenizerFast

from valm.clip import Clip
from valm.demo.corpus import caption
from valm.demo.things import Thing, drawing_tensor, random_views

IMAGE_SIZE = 64
DRAWING_SIZE = 96  # the resolution that views are taken from
MODEL_CFG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 16, "layers": 2, "width": 128, "head_width": 32},
    "text_cfg": {"context_length": 32, "layers": 2, "width": 128, "heads": 4},
}
# Pixels from -1 to 1.
PREPROCESS_CFG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# With few pictures a free temperature goes on growing after there is nothing left to learn.
MAX_LOGIT_SCALE = 50.0


def train_clip(
    things: list[Thing],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    progress: bool = True,
) -> tuple[Clip, list[float]]:
    """Trains a CLIP of MODEL_CFG on fresh views and fresh captions of different things in every step.

    Returns:
        The CLIP, and the loss of each step.
    """
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    clip = Clip.create(MODEL_CFG, tokenizer, preprocess_cfg=PREPROCESS_CFG, name="valm-demo-clip")
    model = clip.model.train().requires_grad_(True)
    drawings = drawing_tensor(things, DRAWING_SIZE)
    batch_size = min(batch_size, len(things))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    contrast = ClipLoss()
    losses: list[float] = []
    queue: list[int] = []
    with trange(steps, desc="CLIP", unit="step", disable=not progress) as bar:
        for _ in bar:
            if len(queue) < batch_size:
                queue = torch.randperm(len(things), generator=generator).tolist()
            batch, queue = queue[:batch_size], queue[batch_size:]
            images = pixels(random_views(drawings[batch], IMAGE_SIZE, generator))
            texts = clip.token_ids([caption(things[i].name, rng) for i in batch])
            loss = contrast(
                model.encode_image(images, normalize=True),
                model.encode_text(texts, normalize=True),
                model.logit_scale.exp(),
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval().requires_grad_(False)
    return clip, losses


def pixels(views: torch.Tensor) -> torch.Tensor:
    """Views (N, 3, H, W) in [0, 1] as the vision tower takes them."""
    return views * 2 - 1
