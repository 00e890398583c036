"""A layer of your own around visual_fusion_attn: it learns to name what only the images show.

python examples/attention_layer.py   # a few seconds on a CPU
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from valm_kernels import visual_fusion_attn

WORDS, WIDTH, HEADS, IMAGES, POOL = 8, 64, 4, 2, 40
BATCH, TOKENS, STEPS = 16, 12, 200


class ImageReader(nn.Module):
    """One attention layer over text and images. An image is a vector; index -1 means no image."""

    def __init__(self, image_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.image_key_value = nn.Linear(image_dim, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, pool: Tensor, image_index: Tensor) -> Tensor:
        """ids (B, T), pool (U, E), image_index (B, T, K) -> logits (B, T, WORDS)."""
        q, k, v = (_heads(part) for part in self.query_key_value(self.embedding(ids)).chunk(3, -1))
        image_k, image_v = (_heads(part) for part in self.image_key_value(pool).chunk(2, -1))  # (H, U, D)
        read = visual_fusion_attn(q, k, v, image_k, image_v, image_index=image_index)  # (B, H, T, D)
        return self.out(read.transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    """(..., N, WIDTH) -> (..., H, N, D)"""
    return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


def main() -> None:
    torch.manual_seed(0)
    shown = torch.arange(POOL) % WORDS  # what each image shows
    pool = F.one_hot(shown, WORDS).float() + 0.1 * torch.randn(POOL, WORDS)
    model = ImageReader(WORDS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS + 1):
        ids = torch.randint(WORDS, (BATCH, TOKENS))
        answer = torch.randint(WORDS, (BATCH, TOKENS))  # only the token's images show the answer, not the text
        image_index = answer[..., None] + WORDS * torch.randint(POOL // WORDS, (BATCH, TOKENS, IMAGES))
        loss = F.cross_entropy(model(ids, pool, image_index).flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        without = model(ids, pool, torch.full_like(image_index, -1))
    print(f"without images: loss {F.cross_entropy(without.flatten(0, 1), answer.flatten()).item():.3f}")


if __name__ == "__main__":
    main()
