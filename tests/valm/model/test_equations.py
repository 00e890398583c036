"""The fusion layer of a GPT-2 against the equations of the paper, in float64."""

import pytest
import torch
from torch import nn

from tests.valm.models import random_images, tiny_config, tiny_model
from valm.model.augment import fusion_module
from valm.model.gpt2 import VaLMForCausalLM


def layer(**arguments):
    model = tiny_model(**arguments).double()
    return model.transformer.h[1], fusion_module(model)


def attended(block, x, **images):
    """What the attention of `block` makes of x (B, T, C)."""
    found = []
    hook = block.attn.register_forward_hook(lambda module, arguments, output: found.append(output[0]))
    block(x, **images)
    hook.remove()
    return found[0]


def expected(block, fusion, x, pool, index):
    """Equations 3-7 of the paper, token by token and head by head."""
    attention, x = block.attn, block.ln_1(x)
    width, heads, dim = attention.embed_dim, attention.num_heads, attention.head_dim
    query_w, key_w, value_w = attention.c_attn.weight.split(width, dim=1)
    query_b, key_b, value_b = attention.c_attn.bias.split(width)
    z = pool if fusion.proj is None else pool @ fusion.proj.weight.T
    z = nn.functional.layer_norm(z, (width,), fusion.norm.weight, fusion.norm.bias, fusion.norm.eps)
    logit_bias = fusion.initial_logit_bias + fusion.logit_bias_delta
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            slots = [s for s in index[b, i].tolist() if s >= 0]
            for h in range(heads):
                part = slice(h * dim, (h + 1) * dim)
                q = x[b, i] @ query_w[:, part] + query_b[part]
                text_k = x[b, : i + 1] @ key_w[:, part] + key_b[part]
                text_v = x[b, : i + 1] @ value_w[:, part] + value_b[part]
                image_k = z[slots] @ key_w[:, part] + key_b[part] + fusion.k_bias[h]
                image_v = z[slots] @ value_w[:, part] + value_b[part] + fusion.v_bias[h]
                scores = torch.cat([text_k @ q, image_k @ q]) * attention.scaling
                scores[i + 1 :] += logit_bias[h]
                out[b, i, part] = scores.softmax(0) @ torch.cat([text_v, image_v])
    return attention.c_proj(out)


@pytest.mark.parametrize("image_dim", [24, 32])
@pytest.mark.parametrize(
    ("options", "scaling"),
    [({}, 8**-0.5), ({"fusion_scale": "embed_dim"}, 32**-0.5), ({"scale_attn_weights": False}, 1.0)],
    ids=str,
)
def test_equals_the_equations_of_the_paper(image_dim, options, scaling):
    block, fusion = layer(image_dim=image_dim, layer_norm_epsilon=1e-3, **options)
    assert (fusion.proj is None) == (image_dim == 32)
    assert block.attn.scaling == scaling
    pool, index = random_images(tiny_config(image_dim=image_dim), 2, 5)
    x, pool = torch.randn(2, 5, 32).double(), pool.double()
    found = attended(block, x, image_pool=pool, image_index=index)
    torch.testing.assert_close(found, expected(block, fusion, x, pool, index))


def test_images_cost_3072_parameters_at_the_papers_size():
    with torch.device("meta"):
        sizes = {"n_embd": 768, "n_head": 12, "image_dim": 768}
        counts = [VaLMForCausalLM(tiny_config(**sizes, num_images=k)).num_parameters() for k in (4, 0)]
    assert counts[0] - counts[1] == 3072 + 12  # LN_img and two biases, and one number per head
