"""A CLIP small enough for every test."""

import torch

from valm.clip.clip import Clip

TEXTS = [
    "a red apple lies on the wooden table. the sky is blue! is the grass green?",
    'two dogs run; she said "look at the yellow bus." and then: a small boat, a lemon, and 12 black cats.',
]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "width": 32, "heads": 2, "layers": 3},
}


def make_clip(tokenizer, seed=0, custom_text=False, **text_cfg) -> Clip:
    """A tiny CLIP whose random weights are large enough that every part of the text encoder matters."""
    torch.manual_seed(seed)
    model_cfg = {**TINY, "custom_text": custom_text, "text_cfg": {**TINY["text_cfg"], **text_cfg}}
    clip = Clip.create(model_cfg, tokenizer, name="tiny")
    for name, parameter in clip.model.named_parameters():
        if not name.startswith("visual") and parameter.ndim > 1:
            parameter.data.mul_(4)
    return clip
