import pytest
import torch

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.model.decoders import IMAGE_DIM, augmented, each_model, random_ids, random_images
from tests.valm.model.test_attention import Head, interval_mask, problem
from valm.model.attention import fusion_attention, joint_weights
from valm.model.augment import fusion_module

SINK = torch.tensor([0.5, -1.0, 3.0, 0.0])
HOLE = interval_mask(torch.zeros(2, 7), 7)
HOLE[0, 0, 5, 2] = False


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize(
    "extras", [{}, {"softcap": 2.0}, {"s_aux": SINK}, {"position_bias": torch.linspace(-1, 1, 7).expand(2, 4, 7, 7)}]
)
@pytest.mark.parametrize("mask", [None, HOLE, interval_mask(torch.tensor([[0] * 7, [9, 9, 2, 3, 4, 5, 6]]), 7)])
def test_the_weights_are_those_of_the_output(images, extras, mask):
    (query, key, value), given = problem(images=images)
    out = fusion_attention(Head(), query, key, value, mask, images=given, **extras)[0].transpose(1, 2)
    read = []
    fusion_attention(Head(), query, key, value, mask, images=given, read_weights=lambda *a: read.append(a), **extras)
    (arguments,) = read
    text, image = joint_weights(*arguments)
    expected = text @ value.repeat_interleave(2, 1)
    assert image.shape == (2, 4, 7, 3 if images else 0)
    if given is not None:
        image_v = given.values + given.terms.v_bias[:, None]  # (Hkv, U, D)
        gathered = image_v[:, given.image_index.clamp(min=0)].repeat_interleave(2, 0).transpose(0, 1)
        expected = expected + (image[..., None] * gathered).sum(-2)
    assert_agree(out, expected)


@each_model
def test_a_model_shows_its_weights(make):
    model, ids, images = make(), random_ids(2, 6), random_images(2, 6)
    before = model(ids, **images).logits
    text, image = model.fusion_attention(ids, **images)
    assert text.shape == (2, 4, 6, 6) and image.shape == (2, 4, 6, 3)
    torch.testing.assert_close(text.sum(-1) + image.sum(-1), torch.ones(2, 4, 6))
    assert image[images["image_index"][:, None].expand(-1, 4, -1, -1) == -1].abs().max() == 0
    assert torch.equal(model(ids, **images).logits, before)  # it computes as before
    with torch.no_grad():
        fusion_module(model).logit_bias_delta[2] = -1e4
    closed = model.fusion_attention(ids, **images)[1]
    assert closed[:, 2].max() == 0 and closed[:, 1].max() > 0
    for none in ({}, {"image_pool": torch.zeros(0, IMAGE_DIM), "image_index": torch.full((2, 6, 3), -1)}):
        text, image = model.fusion_attention(ids, **none)
        assert image.shape == (2, 4, 6, 0)
        torch.testing.assert_close(text.sum(-1), torch.ones(2, 4, 6))


def test_a_layer_that_runs_several_times_shows_the_weights_of_the_last():
    model, ids, images = augmented(lambda seed: tiny("hrm_text")), random_ids(1, 6), random_images(1, 6)
    read = []
    model(ids, **images, use_cache=False, read_weights=lambda *arguments: read.append(joint_weights(*arguments)))
    assert len(read) > 1 and not torch.equal(read[0][1], read[-1][1])
    for weights, last in zip(model.fusion_attention(ids, **images), read[-1], strict=True):
        assert torch.equal(weights, last)


def test_padding_sees_no_text_but_itself():
    model, ids, images = augmented(), random_ids(1, 6), random_images(1, 6)
    text, _ = model.fusion_attention(ids, **images, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    assert text[0, :, 2:, :2].max() == 0 and text[0, :, 3:, 2].min() > 0
