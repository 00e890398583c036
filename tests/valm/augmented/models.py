"""A tiny augmented decoder with open images."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.valm.augmented.families import open_images
from valm.augmented.model import augment, fusion_module

VOCAB, IMAGE_DIM, IMAGES = 64, 24, 3
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_llama(seed=0, **arguments):
    """Grouped queries, rotary positions; weights large enough that everything matters."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return _randomised(LlamaForCausalLM, LlamaConfig(**SMALL, **sizes, **heads, **arguments), seed)


def tiny_gpt2(seed=0, **arguments):
    config = GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=4, n_positions=128, **arguments)
    return _randomised(GPT2LMHeadModel, config, seed)


def _randomised(model_class, config, seed):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return model


def augmented(base=tiny_llama, seed=0, **arguments):
    """With open images and biases that are not 0."""
    model = augment(base(seed), IMAGE_DIM, IMAGES, **arguments)
    open_images(model)
    generator = torch.Generator().manual_seed(seed)
    module = fusion_module(model)
    with torch.no_grad():
        for bias in (module.k_bias, module.v_bias, module.logit_bias):
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.3)
    return model


def random_ids(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_images(batch, length, pool=7, seed=0):
    """image_pool (pool, E) and image_index (batch, length, K), some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, pool, (batch, length, IMAGES), generator=generator)
    return {"image_pool": torch.randn(pool, IMAGE_DIM, generator=generator), "image_index": index}
