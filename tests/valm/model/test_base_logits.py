"""A text in which no token sees an image gets the logits of the base, to the bit."""

import copy

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.valm.model.decoders import (
    HEADS,
    IMAGE_DIM,
    IMAGES,
    SIZES,
    SMALL,
    _randomised,
    random_ids,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
)
from tests.valm.models import HashRetriever
from valm.model.adapter import load_adapter, save_adapter
from valm.model.augment import augment
from valm.retrieval.retriever import NoImages


def tiny_mistral():
    return _randomised(MistralForCausalLM, MistralConfig(**SMALL, **SIZES, **HEADS, sliding_window=4), 0)


def tiny_qwen3():
    return _randomised(Qwen3ForCausalLM, Qwen3Config(**SMALL, **SIZES, **HEADS, head_dim=8), 0)


def tiny_gemma2():
    sizes = SIZES | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}
    return _randomised(Gemma2ForCausalLM, Gemma2Config(**SMALL, **sizes, **HEADS), 0)


def tiny_gpt_oss():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
    return _randomised(GptOssForCausalLM, GptOssConfig(**SMALL, **SIZES, **HEADS, **experts), 0)


FAMILIES = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen3": tiny_qwen3,
    "opt": tiny_opt,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "gpt-oss": tiny_gpt_oss,
}
EAGER = ("gemma2", "gpt-oss")  # by themselves


def both(family, attention="sdpa", dtype=torch.float32):
    """A base, and the same with open image attention. Both are frozen: with weights that require gradients, PyTorch
    multiplies a slice of the hidden states in another order."""
    base = FAMILIES[family]().to(dtype).requires_grad_(False)
    base.set_attn_implementation("eager" if family in EAGER else attention)
    return base, augment(copy.deepcopy(base), IMAGE_DIM, IMAGES, logit_bias=1.0).eval()


def no_images(ids, kind):
    if kind == "nothing":
        return {}
    pool = torch.randn(0 if kind == "an empty pool" else 5, IMAGE_DIM)
    return {"image_pool": pool, "image_index": torch.full((*ids.shape, IMAGES), -1)}


def masks(ids):
    """No mask, and padding on either side of the second row."""
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, -3:] = left[1, :3] = 0
    return {"none": None, "right": right, "left": left}


@pytest.mark.filterwarnings("ignore:this model takes 3 images a token")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_one_pass(family, attention, dtype):
    base, model = both(family, attention, dtype)
    ids = random_ids(2, 9)
    for mask in masks(ids).values():
        expected = base(ids, attention_mask=mask).logits
        for kind in ("nothing", "an empty pool", "no token's images"):
            assert torch.equal(model(ids, attention_mask=mask, **no_images(ids, kind)).logits, expected), (mask, kind)


@pytest.mark.parametrize("retriever", ["without images", "below the threshold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token(family, retriever):
    """With a cache, behind padding, beyond a window and with a static cache."""
    base, model = both(family)
    if retriever == "without images":
        model.set_retriever(NoImages(IMAGES, IMAGE_DIM))
    else:
        model.set_retriever(HashRetriever())
        model.set_min_score(2.0)
    ids = random_ids(2, 7)
    for mask in (None, masks(ids)["left"]):
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            found = [
                one.generate(
                    ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_scores=True,
                    return_dict_in_generate=True, **options,
                )
                for one in (base, model)
            ]  # fmt: skip
            assert torch.equal(found[0].sequences, found[1].sequences)
            assert all(map(torch.equal, found[0].scores, found[1].scores))


def test_an_image_at_one_token_changes_the_logits_from_there_on():
    base, model = both("llama")
    ids = random_ids(1, 9)
    images = no_images(ids, "no token's images")
    images["image_index"][0, 5] = torch.arange(IMAGES)
    found, expected = model(ids, **images).logits, base(ids).logits
    assert torch.allclose(found[:, :5], expected[:, :5], atol=1e-4) and (found[:, 5:] != expected[:, 5:]).any(-1).all()


def test_after_a_training_and_from_an_adapter(tmp_path):
    base, model = both("llama")
    ids = random_ids(2, 9)
    images = {"image_pool": torch.randn(5, IMAGE_DIM), "image_index": torch.randint(5, (2, 9, IMAGES))}
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    model.train()(ids, labels=ids, **images).loss.backward()
    optimizer.step()
    save_adapter(model.eval(), tmp_path)
    none = no_images(ids, "no token's images")
    for one in (model, load_adapter(copy.deepcopy(base), tmp_path)):
        assert torch.equal(one(ids, **none).logits, base(ids).logits)
        assert not torch.equal(one(ids, **images).logits, base(ids).logits)
