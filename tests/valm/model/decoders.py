"""Tiny augmented decoders with open images, and `each_model`, which parametrizes a test by all models with images."""

from functools import partial

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from tests.checks.families import open_images
from tests.valm.models import BOS, tiny_model
from valm.model.augment import augment, fusion_module

VOCAB, IMAGE_DIM, IMAGES = 64, 24, 3
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def tiny_llama(seed=0, **arguments):
    """Grouped queries, rotary positions, and weights large enough that everything matters."""
    return _randomised(LlamaForCausalLM, LlamaConfig(**(SMALL | SIZES | HEADS | arguments)), seed)


def tiny_minimax(seed=0):
    """Full and linear attention in turn, with its own cache class."""
    sizes = SIZES | {"num_hidden_layers": 4, "head_dim": 8, "block_size": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return _randomised(MiniMaxForCausalLM, MiniMaxConfig(**SMALL, **sizes, **HEADS, **experts), seed)


def tiny_phi3_longrope(seed=0):
    """Beyond 10 tokens the frequencies of the rotation change."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rotation = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 10, **factors}
    threshold = {"rope_parameters": rotation, "original_max_position_embeddings": 10}
    return _randomised(Phi3ForCausalLM, Phi3Config(**SMALL, **SIZES, **HEADS, **threshold), seed)


def tiny_gpt2(seed=0, **arguments):
    config = GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=4, n_positions=128, **arguments)
    return _randomised(GPT2LMHeadModel, config, seed)


def tiny_opt(seed=0):
    """Its language model calls the decoder inside the base model, not the base model."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "dropout": 0.0}
    return _randomised(OPTForCausalLM, OPTConfig(**SMALL, **sizes, word_embed_proj_dim=32), seed)


def _randomised(model_class, config, seed):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return model


def augmented(base=tiny_llama, seed=0, **arguments):
    """Opens the images and sets biases that are not 0."""
    model = augment(base(seed), IMAGE_DIM, IMAGES, **arguments)
    open_images(model)
    generator = torch.Generator().manual_seed(seed)
    module = fusion_module(model)
    with torch.no_grad():
        for bias in (module.k_bias, module.v_bias, module.logit_bias_delta):
            bias.add_(torch.randn(bias.shape, generator=generator) * 0.3)
    return model


each_model = pytest.mark.parametrize("make", [augmented, partial(augmented, tiny_gpt2), tiny_model])


def random_ids(batch, length, seed=0):
    """Ordinary tokens, also for a `tiny_model`."""
    return torch.randint(3, BOS, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_images(batch, length, pool=7, seed=0):
    """image_pool (pool, E) and image_index (batch, length, K), some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, pool, (batch, length, IMAGES), generator=generator)
    return {"image_pool": torch.randn(pool, IMAGE_DIM, generator=generator), "image_index": index}
