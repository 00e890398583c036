import pytest
import torch
from torch import nn

from tests.tolerance import assert_agree
from tests.valm.model.decoders import IMAGE_DIM, augmented
from tests.valm.training.test_processes import launch
from valm.errors import ValmError
from valm.model import attention as fusion
from valm.model.attention import FusionTerms, Images, Scoring, fusion_attention, joint_attention
from valm.model.augment import fusion_module


class Head(nn.Module):
    """All that `fusion_attention` asks of the attention."""


def problem(dim=16, value_dim=16, length=7, past=0, seed=0, images=True):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    text = random(2, 4, length, dim), random(2, 2, past + length, dim), random(2, 2, past + length, value_dim)
    if not images:
        return text, None
    terms = FusionTerms(random(1, 5, 8), random(2, dim), random(2, value_dim), random(4))
    index = torch.randint(-1, 5, (2, length, 3), generator=generator)
    return text, Images(random(2, 5, dim), random(2, 5, value_dim), index, random(2, 4, length, dim), terms)


def interval_mask(first_key, length, past=0):
    key = torch.arange(past + length)
    return ((key >= first_key[..., None]) & (key <= key[past:, None]))[:, None]


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -1.0, 3.0, 0.0])}])
@pytest.mark.parametrize("dims", [(16, 16), (24, 16), (16, 24)])
def test_kernel_and_joint_attention_agree(extras, dims, images, monkeypatch):
    (query, key, value), given = problem(*dims, past=3, images=images)
    mask = interval_mask(torch.tensor([[0] * 7, [9, 9, 2, 3, 4, 5, 6]]), 7, past=3)
    outputs = []
    for reason in (None, "asked for"):
        monkeypatch.setattr(fusion, "why_joint_eager", lambda *_, reason=reason: reason)
        outputs.append(fusion_attention(Head(), query, key, value, mask, images=given, **extras)[0])
    assert_agree(*outputs)


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])])
def test_joint_attention_in_float64_by_hand(sink):
    (query, key, value), images = problem()
    out = joint_attention(query, key, value, images, None, Scoring(0.25, softcap=1.5, sink=sink))
    batch, head, token = 1, 3, 4
    text = (key[batch, head // 2, : token + 1] @ query[batch, head, token]).double() * 0.25
    index = images.image_index[batch, token]
    keys = (images.keys + images.terms.k_bias[:, None])[head // 2, index[index >= 0]]
    image = (keys @ images.query[batch, head, token]).double() * 0.25
    scores = [1.5 * torch.tanh(text / 1.5), 1.5 * torch.tanh(image / 1.5) + images.terms.logit_bias[head]]
    if sink is not None:
        scores.append(sink[head, None].double())
    weights = torch.cat(scores).softmax(0)
    image_value = (images.values + images.terms.v_bias[:, None])[head // 2, index[index >= 0]]
    values = torch.cat([value[batch, head // 2, : token + 1], image_value])
    expected = weights[: len(values)] @ values.double()
    assert_agree(out[batch, head, token], expected)


def test_a_mask_with_holes_is_obeyed():
    (query, key, value), images = problem()
    mask = interval_mask(torch.zeros(2, 7), 7)
    mask[0, 0, 5, 2] = False
    assert fusion.why_joint_eager(query, value, None, mask[:, 0]) == "mask with holes"
    out = fusion_attention(Head(), query, key, value, mask, images=images)[0]
    moved = fusion_attention(Head(), query, key.index_fill(2, torch.tensor([2]), 9.0), value, mask, images=images)[0]
    assert torch.equal(out[0, 5], moved[0, 5])
    assert not torch.equal(out[0, 4], moved[0, 4])


def test_a_head_dimension_that_the_kernel_lacks():
    (query, key, value), images = problem(4, 4)
    expected = joint_attention(query, key, value, images, None, Scoring(0.5)).transpose(1, 2)
    assert torch.equal(fusion_attention(Head(), query, key, value, None, images=images)[0], expected)


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan():
    (query, key, value), _ = problem(images=False)
    query.requires_grad_()
    seen = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    seen[1, 3] = False
    out = joint_attention(query, key, value, None, seen, Scoring(0.25))
    assert not out[1, :, 3].any()
    out.sum().backward()
    assert query.grad.isfinite().all() and not query.grad[1, :, 3].any()


def test_the_fusion_returns_no_parameter():
    """FSDP2 that wraps the fusion by itself frees its parameters after its forward."""
    module = fusion_module(augmented())
    terms = module(torch.randn(7, IMAGE_DIM))
    held = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert not held & {term.untyped_storage().data_ptr() for term in terms}


@pytest.mark.slow  # two processes that import torch
def test_heads_that_are_divided_among_processes_get_their_own_biases(tmp_path):
    launch("tests.valm.model.tensor_parallel", tmp_path)


def test_limits_are_those_of_the_mask():
    first_key = torch.tensor([[0] * 7, [9, 9, 2, 3, 4, 5, 6]])
    mask = interval_mask(first_key, 7, past=3)
    limits = fusion.read_limits(mask[:, 0])
    assert limits.cache_seqlens is None
    static = torch.nn.functional.pad(mask, (0, 5))  # a cache of 15 keys that holds 10
    first, seqlens, *_ = fusion.read_limits(static[:, 0])
    assert first[0].equal(limits.first_key[0]) and seqlens.tolist() == [10, 10]
    assert first.dtype == seqlens.dtype == torch.int32
    assert first[1].tolist() == [15, 15, 2, 3, 4, 5, 6]  # sees nothing where its first key comes later
    padded = torch.zeros(2, 1, 4, dtype=torch.bool)
    padded[1, 0, 1:3] = True
    first, seqlens, *_ = fusion.read_limits(padded)
    assert first.tolist() == [[4], [1]] and seqlens.tolist() == [0, 3]
    assert fusion.read_limits(torch.ones(2, 7, 10, dtype=torch.bool)) is None  # an encoder's: all keys for all queries
    assert fusion.read_limits(torch.ones(2, 1, 10, dtype=torch.bool)) == fusion.TextLimits()
    causal = interval_mask(torch.zeros(2, 7), 7, past=3)[:, 0]
    assert fusion.read_limits(causal) == fusion.TextLimits()  # as without a mask
    for hole in ((0, 3, 1), (1, 6, 8), (0, 5, 12)):
        other = static[:, 0].clone()
        other[hole] ^= True
        assert fusion.read_limits(other) is None, hole


@pytest.mark.parametrize("length, masked", [(7, True), (2, False), (5, False)])
def test_a_static_cache_goes_through_the_kernel(monkeypatch, length, masked):
    """While it is being filled transformers gives no mask: each token sees the keys up to its own."""
    past = 3 if masked else 0
    (query, key, value), images = problem(length=length, past=past)
    mask = interval_mask(torch.zeros(2, length), length, past) if masked else None
    expected = fusion_attention(Head(), query, key, value, mask, images=images)
    monkeypatch.setattr(fusion, "joint_attention", None)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 5), value=torch.nan) for x in (key, value))
    static = None if mask is None else torch.nn.functional.pad(mask, (0, 5))
    found = fusion_attention(Head(), query, key, value, static, images=images)
    torch.testing.assert_close(found[0], expected[0])


def test_a_mask_of_another_implementation_is_refused():
    with pytest.raises(ValmError, match='attn_implementation="sdpa"'):
        fusion.visible_keys(torch.ones(2, 5))
