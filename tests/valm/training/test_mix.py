import math

import numpy as np
import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.training.documents import Vectors, documents, new_trainer, trained
from tests.valm.training.test_train import plain_llama
from valm.model.adapter import load_adapter, save_adapter
from valm.model.augment import augment
from valm.training.image_trainer import FUSION_NAME
from valm.training.mix import SHARES, base_weights, mix

# Texts from back to front, of which a training forgets more the longer it is.
HELD_OUT = documents(count=4, seed=1)[::-1]
for document in HELD_OUT:
    document["input_ids"] = [document["input_ids"][0], *document["input_ids"][:0:-1]]
OVERFITTED = {"max_steps": 20, "learning_rate": 3e-2}


def overfitted(folder, num_images=3, unfreeze="block", **fields):
    """A finished training and the weights of before."""
    model = augment(plain_llama(), image_dim=24, num_images=num_images, logit_bias=0.0, unfreeze=unfreeze)
    before = base_weights(model)
    kb = Vectors() if num_images else None
    return trained(folder, model=model, kb=kb, eval_dataset=HELD_OUT, **(OVERFITTED | fields)), before


def state(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(
    ("num_images", "unfreeze"),
    [
        (3, "block"),
        (0, "all"),
        pytest.param(3, "all", marks=pytest.mark.slow),
        pytest.param(0, "block", marks=pytest.mark.slow),
    ],
)
def test_the_share_of_the_least_held_out_loss_is_mixed(tmp_path, num_images, unfreeze):
    made, before = overfitted(tmp_path, num_images, unfreeze)
    after = state(made.model)
    assert before and not any(FUSION_NAME in name for name in before)
    losses = []
    for share in SHARES:
        for name, weight in before.items():
            made.model.get_parameter(name).data.copy_((1 - share) * after[name] + share * weight)
        losses.append(made.evaluate()["eval_loss"])
    expected = SHARES[np.argmin(losses)]
    assert expected > 0
    made.model.load_state_dict(after)
    found = mix(made, before)
    assert found["base_share"] == expected
    assert_agree(found["eval_loss"], min(losses))
    assert_agree(found["eval_perplexity"], math.exp(min(losses)))
    assert_agree(found["eval_perplexity_trained"], math.exp(losses[0]))
    for name, weight in made.model.state_dict().items():
        mixed = (1 - expected) * after[name] + expected * before[name] if name in before else after[name]
        torch.testing.assert_close(weight, mixed)
    assert ("eval_perplexity_without_images" in found) == (num_images > 0)
    base = new_trainer(tmp_path, model=plain_llama(), kb=None, eval_dataset=HELD_OUT).evaluate()
    assert_agree(found["eval_perplexity_base"], base["eval_perplexity"])
    if num_images:
        blind = [document | {"image_ids": np.full_like(document["image_ids"], -1)} for document in HELD_OUT]
        without = made.evaluate(blind)["eval_perplexity"]
        assert_agree(found["eval_perplexity_without_images"], without)
        assert abs(without / found["eval_perplexity"] - 1) > 1e-3


def test_of_equal_shares_the_smallest_is_chosen(tmp_path):
    made, before = overfitted(tmp_path, learning_rate=0.0)
    assert mix(made, before)["base_share"] == 0


def test_a_frozen_base_is_not_mixed_and_no_share_is_said(tmp_path):
    made, before = overfitted(tmp_path, unfreeze="")
    after = state(made.model)
    found = mix(made, before)
    assert before == {} and "base_share" not in found
    assert all(torch.equal(weight, after[name]) for name, weight in made.model.state_dict().items())
    assert found["eval_perplexity_base"] == found["eval_perplexity_without_images"] != found["eval_perplexity"]


@pytest.mark.parametrize("held_out", [True, False])
def test_a_share_that_is_given(tmp_path, held_out):
    made, before = overfitted(tmp_path)
    after = state(made.model)
    if not held_out:
        made.eval_dataset = None
    found = mix(made, before, 0.4)
    assert found["base_share"] == 0.4 and ("eval_perplexity_trained" in found) == held_out
    for name, weight in before.items():
        torch.testing.assert_close(made.model.get_parameter(name).data, 0.6 * after[name] + 0.4 * weight)


def test_the_weights_keep_their_type_where_evaluations_are_narrow(tmp_path):
    made, before = overfitted(tmp_path, bf16_full_eval=True)
    mix(made, before)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}


def test_a_mixed_model_is_saved_as_an_adapter_too(tmp_path):
    made, before = overfitted(tmp_path / "run")
    assert mix(made, before)["base_share"] > 0
    save_adapter(made.model, tmp_path / "adapter")
    loaded = load_adapter(plain_llama(), tmp_path / "adapter")
    assert all(torch.equal(weight, made.model.state_dict()[name]) for name, weight in loaded.state_dict().items())
