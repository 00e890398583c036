"""What a VaLM has of its own; the tests of augmented decoders run with one too."""

import inspect

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from tests.tolerance import assert_agree
from tests.valm.models import BOS, EOS, VOCAB, HashRetriever, random_ids, random_images, tiny_config, tiny_model
from valm.errors import ValmError
from valm.model.gpt2 import VaLMForCausalLM


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inverse", [False, True])
def test_without_pictures_it_is_gpt2(attention, inverse):
    model = tiny_model(num_images=0, scale_attn_by_inverse_layer_idx=inverse)
    model.set_attn_implementation(attention)
    names = GPT2Config().to_dict().keys() - {"model_type"}
    gpt2 = GPT2LMHeadModel(GPT2Config(**{name: getattr(model.config, name) for name in names})).eval()
    gpt2.load_state_dict(model.state_dict())
    ids = random_ids(3, 20)
    out, expected = (one(ids, labels=ids, output_hidden_states=True) for one in (model, gpt2))
    for name in ("logits", "loss"):
        assert_agree(out[name], expected[name], name)
    for found, state in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_agree(found, state)


def test_one_seed_gives_valm_and_gpt2_the_same_shared_weights():
    torch.manual_seed(5)
    valm = VaLMForCausalLM(tiny_config()).state_dict()
    torch.manual_seed(5)
    gpt2 = VaLMForCausalLM(tiny_config(num_images=0)).state_dict()
    assert set(gpt2) < set(valm)
    for name, weight in gpt2.items():
        assert torch.equal(weight, valm[name]), name
    assert valm["transformer.h.1.attn.image_fusion.proj.weight"].std() > 0.1
    # GPT-2's scheme: what adds to the residual stream starts smaller by sqrt(2 x layers)
    for name in ("h.0.attn.c_proj", "h.1.attn.c_proj", "h.2.mlp.c_proj"):
        assert gpt2[f"transformer.{name}.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)


def test_one_seed_gives_valm_and_gpt2_the_same_dropout():
    """Building either draws the same random numbers, and so does training it."""
    found = []
    for num_images in (3, 0):
        torch.manual_seed(5)
        model = VaLMForCausalLM(tiny_config(num_images=num_images, logit_bias=-1e4)).train()
        ids = random_ids(2, 12)
        pool, index = random_images(tiny_config(), 2, 12)
        images = {"image_pool": pool, "image_index": index} if num_images else {}
        found.append((model(ids, labels=ids, **images).loss, torch.rand(3)))
    assert_agree(*(loss for loss, _ in found))
    assert found[0][1].equal(found[1][1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    lengths = [9, 4, 1]
    pool, index = random_images(model.config, 3, 9)
    ids = torch.full((3, 9), EOS)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    rows = [random_ids(1, n, seed=n)[0] for n in lengths]
    where = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, place) in enumerate(zip(rows, where, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    logits = model(ids, attention_mask=mask, image_pool=pool, image_index=index).logits
    assert logits.isfinite().all()
    for i, (row, place) in enumerate(zip(rows, where, strict=True)):
        alone = model(row[None], image_pool=pool, image_index=index[i : i + 1, place]).logits
        assert_agree(logits[i : i + 1, place], alone)


def test_packed_documents_may_be_longer_than_the_positions_together(model):
    positions = torch.arange(20).repeat(3)[None]
    assert model(random_ids(1, 20).repeat(1, 3), position_ids=positions).logits.shape == (1, 60, VOCAB)
    padded = torch.cat([random_ids(1, 20), torch.full((1, 40), EOS)], 1)
    logits = model(padded, attention_mask=torch.arange(60)[None] < 20).logits
    assert_agree(logits[:, :20], model(padded[:, :20]).logits)
    with pytest.raises(ValueError, match="a document of at least 33 tokens"):
        model(random_ids(1, 33))


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config=tiny_config(), max_cache_len=12)])
def test_a_failed_pass_leaves_the_cache_as_it_was(make):
    model = tiny_model()
    ids, other = random_ids(1, 9), random_ids(1, 4, seed=1)
    pool, index = random_images(model.config, 1, 9)
    cache = make()
    for part in (slice(0, 4), slice(4, 9)):
        with pytest.raises(ValueError, match="image_pool must have shape"):
            model(other, image_pool=pool[:, 1:], image_index=index[:, :4], cache=cache)
        found = model(ids[:, part], image_pool=pool, image_index=index[:, part], cache=cache).logits
        assert_agree(found, model(ids, image_pool=pool, image_index=index).logits[:, part])


def test_its_positional_arguments_are_those_of_its_base():
    """As in any augmented decoder: the second is the cache."""
    model, ids = tiny_model(), random_ids(1, 5)
    names = list(inspect.signature(model.forward).parameters)
    assert names[:3] == list(inspect.signature(GPT2LMHeadModel.forward).parameters)[1:4] and "image_pool" in names
    cache = DynamicCache()
    model(ids, cache)
    assert cache.get_seq_length() == 5


def test_padding_sees_no_images():
    """Its last token predicts the first of the text, so images there would change the loss."""
    model, ids = tiny_model(), random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    pool, index = random_images(model.config, 2, 8)
    other = index.clone()
    other[0, :3] = (other[0, :3] + 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    first, second = (
        model(ids, attention_mask=mask, image_pool=pool, image_index=i, labels=labels).loss for i in (index, other)
    )
    assert first.equal(second)
    assert model.fusion_attention(ids, pool, index, mask)[1][0, :, :3].max() == 0


@torch.no_grad()
def test_a_static_cache_of_the_text_only_twin():
    model = tiny_model(num_images=0)
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    ids[2, :4], mask[2, :4], ids[2, 4] = EOS, 0, BOS
    greedy = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, **greedy, cache_implementation="static").equal(model.generate(ids, **greedy))


@pytest.mark.parametrize("name, value", [("k", 5), ("dim", 7)])
def test_a_retriever_that_does_not_fit_is_refused(model, name, value):
    retriever = HashRetriever(BOS)
    setattr(retriever, name, value)
    with pytest.raises(ValmError, match=rf"retriever.{name} is {value}, but this model was made for"):
        model.set_retriever(retriever)
