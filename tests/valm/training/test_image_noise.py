import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, fusion_module, random_ids, random_images, tiny_llama, tiny_opt
from tests.valm.models import HashRetriever
from tests.valm.training.documents import new_model, new_trainer, trained
from valm.errors import ValmError
from valm.training.image_noise import add_image_noise


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_each_vector_keeps_its_length_and_gets_another_direction_in_training(base):
    model, images = augmented(base, unfreeze="all").train(), random_images(2, 9, pool=500)
    add_image_noise(model, 1.0)
    seen = []
    fusion_module(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = random_ids(2, 9)
    for _ in range(2):
        model(ids, **images)
    pool = images["image_pool"]
    first, second = seen
    assert_agree(first.norm(dim=-1), pool.norm(dim=-1))
    for one, other in ((first, pool), (second, pool)):
        assert torch.cosine_similarity(one, other).mean().item() == pytest.approx(0.5**0.5, abs=0.03)
    assert torch.cosine_similarity(first, second).mean().item() == pytest.approx(0.5, abs=0.04)
    model.eval()(ids, **images)
    assert torch.equal(seen[-1], pool)


def test_the_losses_of_a_training_change_in_training_alone(tmp_path):
    def made(**given):
        return new_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **given)

    plain, noisy, again = (
        trained(tmp_path, model=made(), image_noise=noise, max_steps=3).losses() for noise in (0.0, 1.0, 1.0)
    )
    assert noisy == again and noisy[0] != plain[0]
    evaluated = [new_trainer(tmp_path, model=made(), eval_dataset=None, image_noise=noise) for noise in (0.0, 1.0)]
    losses = [one.evaluate(one.train_dataset)["eval_loss"] for one in evaluated]
    assert losses[0] == losses[1]


def test_a_model_that_retrieves_while_it_trains(tmp_path):
    def first_loss(noise):
        model = new_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model.set_retriever(HashRetriever())
        return trained(tmp_path, model=model, kb=None, max_steps=1, image_noise=noise).losses()[0]

    assert first_loss(1.0) != first_loss(0.0)


@pytest.mark.parametrize(
    "model, given, message",
    [
        ({"num_images": 0}, {"kb": None}, "image_noise is for a model that sees images, but this model sees none"),
        ({}, {"image_noise": float("nan")}, "image_noise must be a finite number from 0 on, got nan"),
    ],
)
def test_what_cannot_be_disturbed_is_refused(tmp_path, model, given, message):
    with pytest.raises(ValmError, match=message):
        new_trainer(tmp_path, **{"model": new_model(**model), "image_noise": 1.0} | given)
