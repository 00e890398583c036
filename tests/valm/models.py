"""Tiny models and batches for the tests of valm."""

import torch

from valm.config import ValmConfig
from valm.model import VaLMForCausalLM

BOS, EOS, VOCAB = 62, 63, 64


def tiny_config(**arguments) -> ValmConfig:
    defaults = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "image_dim": 24,
        "num_images": 3,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    return ValmConfig(**(defaults | arguments))


def tiny_model(seed: int = 0, **arguments) -> VaLMForCausalLM:
    """In eval mode, with weights and biases large enough that everything in it matters."""
    torch.manual_seed(seed)
    model = VaLMForCausalLM(tiny_config(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 or "bias" in name else 0.1))
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) ordinary pieces, SOT first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, BOS, (batch, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def random_images(config: ValmConfig, batch: int, length: int, pool: int = 10, seed: int = 0):
    """image_pool (pool, E) and image_index (batch, length, K), some slots empty."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, pool, (batch, length, config.num_images), generator=generator)
    return torch.randn(pool, config.image_dim, generator=generator), index
