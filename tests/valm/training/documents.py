"""Documents, a knowledge base in memory and a tokenizer for tests that train."""

import numpy as np

from valm.tokenizer import clip_tokenizer, prune_tokenizer

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
            raise IndexError(f"picture ids go from 0 to {len(self.vectors) - 1}, got {ids.max()}")
        return self.vectors[ids]


def documents(num_images=3, count=8, seed=0):
    """`count` documents with random pictures, some slots empty."""
    random = np.random.default_rng(seed)
    made = []
    for text in (TEXTS * (count // len(TEXTS) + 1))[:count]:
        ids = TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id]
        images = random.integers(0, 40, (len(ids), num_images)).astype(np.uint32)
        images[random.random(images.shape) < 0.2] = 2**32 - 1
        made.append({"input_ids": ids, "image_ids": images})
    return made
