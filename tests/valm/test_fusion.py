import pytest
import torch
from torch import nn

from tests.valm.models import random_images, random_scores, tiny_config
from valm.fusion import VisualFusionAttention


def attention(**arguments):
    torch.manual_seed(0)
    module = VisualFusionAttention(tiny_config(**arguments), layer_idx=1).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def expected(module, x, pool, index, retrieval_scores=None):
    """Equations 3-7 of the paper, token by token and head by head, with the scaled retrieval scores if given."""
    width, heads, dim = module.embed_dim, module.num_heads, module.head_dim
    query_w, key_w, value_w = module.c_attn.weight.split(width, dim=1)
    query_b, key_b, value_b = module.c_attn.bias.split(width)
    z = pool if module.image_proj is None else pool @ module.image_proj.T
    z = nn.functional.layer_norm(z, (width,), module.ln_img.weight, module.ln_img.bias)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            slots = [s for s in index[b, i].tolist() if s >= 0]
            for h in range(heads):
                part = slice(h * dim, (h + 1) * dim)
                q = x[b, i] @ query_w[:, part] + query_b[part]
                text_k = x[b, : i + 1] @ key_w[:, part] + key_b[part]
                text_v = x[b, : i + 1] @ value_w[:, part] + value_b[part]
                image_k = z[slots] @ key_w[:, part] + module.image_k_bias[h]
                image_v = z[slots] @ value_w[:, part] + module.image_v_bias[h]
                scores = torch.cat([text_k @ q, image_k @ q]) * module.scaling
                scores[i + 1 :] += module.image_logit_bias[h]
                if retrieval_scores is not None:
                    scores[i + 1 :] += module.image_score_scale * retrieval_scores[b, i][index[b, i] >= 0]
                out[b, i, part] = scores.softmax(0) @ torch.cat([text_v, image_v])
    return module.c_proj(out)


@pytest.mark.parametrize("image_dim", [24, 32])
@pytest.mark.parametrize("scale", ["head_dim", "embed_dim"])
def test_equals_the_equations_of_the_paper(image_dim, scale):
    module = attention(image_dim=image_dim, fusion_scale=scale)
    assert (module.image_proj is None) == (image_dim == 32)
    pool, index = random_images(module.config, 2, 5)
    x, pool = torch.randn(2, 5, 32).double(), pool.double()
    # image_logit_bias enters in float32, so the two agree to float32 only
    torch.testing.assert_close(
        module(x, pool, index, None, None, None), expected(module, x, pool, index), rtol=1e-6, atol=1e-6
    )


def test_the_scaled_retrieval_scores_are_added_to_the_logits_of_images():
    module = attention(image_score_scale_init=0.5)
    pool, index = random_images(module.config, 2, 5)
    scores = random_scores(index)
    assert (scores == -torch.inf).any()
    x, pool = torch.randn(2, 5, 32).double().requires_grad_(), pool.double()
    leaves = [module.image_score_scale, x, *module.parameters()]
    found = module(x, pool, index, scores, None, None)
    truth = expected(module, x, pool, index, scores.double())
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    gradients, expected_gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, truth))
    for gradient, of_formula in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, of_formula, rtol=1e-5, atol=1e-5)
    assert gradients[0].abs() > 1e-3
    weights = module.weights(x, pool, index, scores, None)[1]
    assert not weights.equal(module.weights(x, pool, index, None, None)[1])


def test_weights_of_a_token_sum_to_one_and_empty_slots_have_none():
    module = attention()
    pool, index = random_images(module.config, 2, 5)
    text, images = module.weights(torch.randn(2, 5, 32).double(), pool.double(), index, None, None)
    assert text.shape == (2, 4, 5, 5) and images.shape == (2, 4, 5, 3)
    torch.testing.assert_close(text.sum(-1) + images.sum(-1), torch.ones(2, 4, 5, dtype=text.dtype))
    assert (images[(index < 0)[:, None].expand_as(images)] == 0).all()


def test_pictures_cost_3072_parameters_at_the_papers_size():
    with torch.device("meta"):
        config = tiny_config(n_embd=768, n_head=12, image_dim=768)
        extra = sum(p.numel() for p in VisualFusionAttention(config, 1).parameters())
        extra -= sum(
            p.numel() for p in VisualFusionAttention(tiny_config(n_embd=768, n_head=12, num_images=0), 1).parameters()
        )
    assert extra == 3072 + 12  # LN_img and two biases, and one number per head
