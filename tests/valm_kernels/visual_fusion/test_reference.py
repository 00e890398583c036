import math
from dataclasses import replace

import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm_kernels.visual_fusion.problems import PROBLEMS, Problem, differentiable
from valm_kernels import attention_weights, visual_fusion_attn

PLAIN = Problem(num_queries=5, prefix=2, head_dim=8, num_images=2, first_key="random")
SMALL = replace(PLAIN, softcap=1.5, image_q=True, score_bias=True)
DOCUMENTS = replace(PLAIN, prefix=4, first_key=None, cu_seqlens=True)
CACHE = replace(PLAIN, batch=3, prefix=6, seqlens=True)


def by_the_formula(inputs, scale):
    """out and lse token by token, number by number, as the docstring of visual_fusion_attn writes them."""
    q, k, v = (inputs[name] for name in "qkv")
    u, softcap = inputs.get("image_q", q), inputs.get("softcap", math.inf)

    def cap(score):
        return score if softcap == math.inf else softcap * math.tanh(score / softcap)

    batch, heads, num_queries, _ = q.shape
    group = heads // k.shape[1]
    lengths = inputs.get("cache_seqlens", torch.tensor([k.shape[2]] * batch))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(num_queries):
                pairs = []  # (score, value)
                first = int(inputs["first_key"][b, i]) if inputs.get("first_key") is not None else 0
                last = int(lengths[b]) - 1 - (num_queries - 1 - i if inputs["causal"] else 0)
                if "cu_seqlens" in inputs:
                    row = b * k.shape[2]
                    token = row + i + k.shape[2] - num_queries
                    first = max(first, *(int(c) - row for c in inputs["cu_seqlens"] if c <= token))
                for j in range(max(first, 0), last + 1):
                    pairs.append((cap(scale * q[b, h, i].dot(k[b, h // group, j])), v[b, h // group, j]))
                slots = inputs.get("image_index", inputs.get("image_mask"))
                of_query = slots[b, h // group, i] if slots.dim() == 4 else slots[b, i]
                for n in range(len(of_query)):
                    if "image_index" in inputs:
                        row = int(of_query[n])
                        if row < 0:
                            continue
                        key, value = (inputs[x][h // group, row] for x in ("image_k", "image_v"))
                    else:
                        if not of_query[n]:
                            continue
                        key, value = (inputs[x][b, h // group, i, n] for x in ("image_k", "image_v"))
                    key = key + inputs["image_k_bias"][h // group]
                    score = cap(scale * u[b, h, i].dot(key)) + inputs["image_logit_bias"][h]
                    if "image_score_bias" in inputs:
                        score += inputs["image_score_bias"][b, i, n]
                    pairs.append((score, value + inputs["image_v_bias"][h // group]))
                if pairs:
                    total = sum(math.exp(score) for score, _ in pairs)
                    out[b, h, i] = sum(math.exp(score) / total * value for score, value in pairs)
                    lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize(("pool_size", "by_head"), [(None, False), (3, False), (3, True)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "problem", [PLAIN, SMALL, CACHE], ids=["plain", "softcap, image_q and image_score_bias", "cache"]
)
def test_is_the_formula(problem, pool_size, by_head, causal):
    inputs = replace(problem, pool_size=pool_size, by_head=by_head, causal=causal).inputs()
    out, lse = visual_fusion_attn(**inputs, scale=0.7, return_lse=True, impl="reference")
    expected_out, expected_lse = by_the_formula(inputs, 0.7)
    assert_agree(out, expected_out)
    assert_agree(lse, expected_lse)


@pytest.mark.parametrize("first_key", [None, "random"])
def test_documents_are_the_formula(first_key):
    inputs = replace(DOCUMENTS, first_key=first_key).inputs()
    expected = by_the_formula(inputs, 0.7)
    for bounds in (inputs["cu_seqlens"], inputs["cu_seqlens"].long()):
        results = visual_fusion_attn(**inputs | {"cu_seqlens": bounds}, scale=0.7, return_lse=True, impl="reference")
        for found, truth in zip(results, expected, strict=True):
            assert_agree(found, truth)


@pytest.mark.parametrize("pool_size", [None, 3])
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck_twice(pool_size, fast_mode):
    inputs = replace(SMALL, batch=1, query_heads=2, num_queries=3, pool_size=pool_size).inputs()
    names = list(differentiable(inputs))

    def function(*tensors):
        given = inputs | dict(zip(names, tensors, strict=True))
        out, lse = visual_fusion_attn(**given, return_lse=True, impl="reference")
        return out, lse.masked_fill(lse == -torch.inf, 0)

    leaves = [inputs[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast_mode)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast_mode)


def test_without_images_it_is_ordinary_attention():
    inputs = replace(PROBLEMS["no images"], kv_heads=4).inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"], is_causal=True)
    assert_agree(visual_fusion_attn(**inputs, impl="reference"), expected)


def without_values(inputs):
    """The arguments of attention_weights."""
    return {name: value for name, value in inputs.items() if name not in ("v", "image_v", "image_v_bias")}


@pytest.mark.parametrize(
    "name",
    ["dense", "pooled", "by head", "random first_key", "image_score_bias, pooled", "cache_seqlens", "cu_seqlens"],
)
def test_attention_weights_are_those_of_the_operation(name):
    inputs = PROBLEMS[name].inputs()
    text, image, lse = attention_weights(**without_values(inputs))
    sums = text.sum(-1) + image.sum(-1)
    assert_agree(sums, (lse > -torch.inf).double())
    assert lse.equal(visual_fusion_attn(**inputs, return_lse=True, impl="reference")[1])
    num_queries, num_keys = text.shape[-2:]
    future = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1 + num_keys - num_queries)
    assert (text[..., future] == 0).all()
    if "image_mask" in inputs:
        present = inputs["image_mask"][:, None].expand_as(image)
    elif name == "by head":
        present = (inputs["image_index"] >= 0).repeat_interleave(2, 1)
    else:
        present = (inputs["image_index"] >= 0)[:, None].expand_as(image)
    assert (image[~present] == 0).all()
    # all values equal: the output is that value, whatever the weights
    ones = {**inputs, "v": torch.ones_like(inputs["v"]), "image_v": torch.ones_like(inputs["image_v"])}
    ones["image_v_bias"] = torch.zeros_like(inputs["image_v_bias"])
    assert_agree(visual_fusion_attn(**ones, impl="reference")[..., 0], sums)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    "name", ["dense", "pooled", "by head, all options", "random first_key", "image weights, pooled"]
)
def test_image_weights_are_attention_weights(name, impl):
    inputs = PROBLEMS[name].inputs()
    _, expected, _ = attention_weights(**without_values(inputs))
    out, lse, found = visual_fusion_attn(**inputs, return_lse=True, return_image_weights=True, impl=impl)
    assert_agree(found, expected)
    plain = visual_fusion_attn(**inputs, return_lse=True, impl=impl)
    assert out.equal(plain[0]) and lse.equal(plain[1])


def test_attention_weights_check_their_arguments():
    arguments = without_values(PROBLEMS["pooled"].inputs())
    with pytest.raises(ValueError, match=r"image_index must be -1 .* got 11"):
        attention_weights(**{**arguments, "image_index": arguments["image_index"] + 1})
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        attention_weights(**{**arguments, "k": arguments["k"].float()})


@pytest.mark.parametrize("heads", [1, 4])
def test_a_text_bias_is_a_bias_and_a_mask(heads):
    """By float64's own softmax, with a hole in the mask and a query that sees only images."""
    inputs = replace(PROBLEMS["pooled"], batch=2, query_heads=4, kv_heads=4, num_queries=5, prefix=2).inputs()
    bias = torch.randn(1, heads, 5, 7, dtype=torch.float64)
    bias[..., 2, 3] = bias[..., 4, :] = -torch.inf
    arguments = {name: inputs[name] for name in ("q", "k", "image_k", "image_index")}
    text, image, _ = attention_weights(**arguments, text_bias=bias, causal=False, scale=0.5)
    scores = 0.5 * inputs["q"] @ inputs["k"].transpose(2, 3) + bias
    pool = torch.nn.functional.pad(inputs["image_k"], (0, 0, 0, 1))[:, inputs["image_index"]].transpose(0, 1)
    of_images = 0.5 * (pool @ inputs["q"][..., None])[..., 0]
    of_images = of_images.masked_fill((inputs["image_index"] < 0)[:, None], -torch.inf)
    expected = torch.cat([scores, of_images], -1).softmax(-1)
    assert_agree(torch.cat([text, image], -1), expected)
    assert text[..., 4, :].max() == 0 and text[..., 2, 3].max() == 0 and text[..., 0, 6].min() > 0


def test_attention_weights_have_any_head_dimension():
    q, k = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64)
    text, _, _ = attention_weights(q, k, None)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    assert_agree(text, scores.softmax(-1))


def test_a_compiled_reference_refuses_a_row_that_there_is_not():
    inputs = PROBLEMS["pooled"].inputs()
    arguments = {name: inputs[name] for name in ("q", "k", "image_k", "image_index")}
    torch._dynamo.reset()
    compiled = torch.compile(attention_weights, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(**arguments), attention_weights(**arguments), strict=True):
        torch.testing.assert_close(found, expected)
    arguments["image_index"][0, 0, 0] = 11  # images in the pool
    with pytest.raises(RuntimeError, match="image_index must be -1"):
        compiled(**arguments)


def test_attention_weights_without_images():
    inputs = PROBLEMS["no images"].inputs()
    text, image, lse = attention_weights(inputs["q"], inputs["k"], None)
    assert image.shape == (*lse.shape, 0)
    assert_agree(text.sum(-1), torch.ones_like(lse))


def test_a_compiled_reference_refuses_more_keys_than_there_are():
    q, k, v = torch.randn(3, 2, 2, 7, 16)
    compiled = torch.compile(visual_fusion_attn, backend="eager", fullgraph=True)
    lengths = torch.tensor([7, 8], dtype=torch.int32)
    for some in (lengths - 1, lengths - 3):
        options = {"cache_seqlens": some, "impl": "reference"}
        torch.testing.assert_close(
            compiled(q, k, v, None, None, **options), visual_fusion_attn(q, k, v, None, None, **options)
        )
    with pytest.raises(RuntimeError, match="cache_seqlens must be from 0 to 7"):
        compiled(q, k, v, None, None, cache_seqlens=lengths, impl="reference")
