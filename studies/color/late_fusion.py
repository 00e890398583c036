"""Late fusion: one new layer after the last block of a frozen decoder sees images (after LaMI, arXiv 2406.13621)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valm.model.augment import augment
from valm.model.checkpoint import load_decoder
from valm.model.image_finder import ImageFinder
from valm.model.image_model import ImageModel

WEIGHTS_FILE = "late_fusion.safetensors"


class LateFusion(nn.Module):
    """Each token attends to its images and to a learnt empty one, and then goes through an MLP.

    Both parts begin as no change, as their output projections are 0.

    Args:
        width: C, of the decoder.
        parameters: about how many to have; the MLP is as wide as that leaves.
    """

    def __init__(self, width: int, image_dim: int, heads: int, parameters: int):
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(image_dim, width, bias=False)
        self.image_norm, self.norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.empty = nn.Parameter(torch.zeros(width))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        inner = max(1, round((parameters - sum(one.numel() for one in self.parameters())) / (3 * width)))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, states: Tensor, pool: Tensor, index: Tensor) -> Tensor:
        """states (B, T, C), image vectors pool (U, E) and their rows of each token index (B, T, K), -1 = none."""
        images = self.image_norm(self.proj(pool.to(self.proj.weight.dtype)))
        images = torch.cat((images, self.empty[None]))  # (U + 1, C)
        seen = torch.cat((index, torch.full_like(index[..., :1], len(pool))), -1)  # (B, T, K + 1)
        keys, values = (part(images).unflatten(-1, (self.heads, -1))[seen] for part in (self.key, self.value))
        query = self.query(self.norm(states)).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bthd,btkhd->bthk", query, keys) * query.shape[-1] ** -0.5
        weights = scores.masked_fill((seen < 0)[:, :, None], -torch.inf).softmax(-1)
        states = states + self.out(torch.einsum("bthk,btkhd->bthd", weights, values).flatten(2))
        normal = self.mlp_norm(states)
        return states + self.down(F.silu(self.gate(normal)) * self.up(normal))


class LateFusionLM(ImageModel):
    """Mixin of a causal language model whose last norm reads what `LateFusion` made of the last block's output."""

    _seen: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        image_slots: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward, without a cache; images as in `AugmentedCausalLM.forward`. A row is one document."""
        if image_pool is None:
            image_pool, image_index, _ = self.finder.find_images(input_ids, attention_mask, None, None)
        assert image_pool is not None and image_index is not None
        self._seen = image_pool, image_index
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs | {"use_cache": False}
        )

    def _fuse(self, norm: nn.Module, args: tuple) -> tuple:
        assert self._seen is not None
        return (self.model.image_fusion(args[0], *self._seen),)


def add_late_fusion(base: str, image_dim: int, num_images: int) -> Any:
    """The decoder `base`, frozen, with an untrained `LateFusion` of as many parameters as `augment` would train in it
    with unfreeze="block"."""
    model = load_decoder(base)
    early = augment(load_decoder(base), image_dim, num_images, unfreeze="block")
    parameters = sum(one.numel() for one in early.parameters() if one.requires_grad)
    config = model.config
    # the name that `fusion_lr` and mixing go by
    model.model.image_fusion = LateFusion(config.hidden_size, image_dim, config.num_attention_heads, parameters)
    model.requires_grad_(False)
    model.model.image_fusion.requires_grad_(True)
    model.__class__ = type(type(model).__name__, (LateFusionLM, type(model)), {})
    model.finder = ImageFinder(early.config)  # the decoder's own names its hidden states, the same in all arms
    model.model.norm.register_forward_pre_hook(model._fuse)
    return model


def save_late_fusion(model: Any, folder: Path) -> None:
    save_file(model.model.image_fusion.state_dict(), folder / WEIGHTS_FILE)


def load_late_fusion(folder: Path, base: str, image_dim: int, num_images: int) -> Any:
    """The model that `save_late_fusion` saved."""
    model = add_late_fusion(base, image_dim, num_images)
    model.model.image_fusion.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()
