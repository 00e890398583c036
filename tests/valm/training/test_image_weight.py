import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, random_images, tiny_llama
from tests.valm.training.documents import documents, new_model, new_trainer, trained
from tests.valm.training.test_limited_softmax import gpt2_without_dropout, inputs, limited
from valm.errors import ValmError
from valm.training.image_weight import ImageWeight
from valm.training.next_token_loss import NextTokenLoss


def by_hand(logits, labels, index, weight):
    """The loss, token by token."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for token in range(labels.shape[1] - 1):
            target = labels[row, token + 1]
            if target >= 0:
                of_token = F.cross_entropy(logits[row, token].double(), target)
                total, count = total + of_token * (weight if (index[row, token] >= 0).any() else 1), count + 1
    return total / count


@pytest.mark.parametrize("base", [tiny_llama, gpt2_without_dropout])
def test_the_loss_of_a_token_that_sees_an_image_is_multiplied(base):
    model, images = augmented(base, unfreeze="all").train(), random_images(2, 9)
    images["image_index"][0, 4:6] = -1
    ImageWeight(model, 3.0)
    call = inputs() | images
    found = model(**call)
    expected = by_hand(found.logits, call["labels"], images["image_index"], 3.0)
    assert_agree(found.loss, expected.float())
    number = torch.tensor(5.0)
    assert_agree(model(**call, num_items_in_batch=number).loss, expected.float() * 12 / 5)
    unweighted = by_hand(found.logits, call["labels"], images["image_index"], 1.0)
    model.eval()
    assert_agree(model(**call).loss, unweighted.float())


def test_it_is_also_the_loss_of_a_limited_softmax():
    model = augmented(gpt2_without_dropout, unfreeze="all").train()
    call = inputs() | random_images(2, 9)
    ImageWeight(model, 3.0)
    expected = model(**call).loss
    limited(model)._sampled = 1 << 20  # all other tokens
    assert_agree(model(**call).loss, expected)


@pytest.mark.parametrize("limit_softmax", [False, True])
def test_the_loss_of_a_step_is_the_same_in_any_batch(tmp_path, limit_softmax):
    losses = []
    for name, sizes in (("whole", (8, 1)), ("parts", (2, 4))):
        fields = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1], "max_steps": 3}
        given = {"dataset": documents(), "image_weight": 4.0, "limit_softmax": limit_softmax}
        model = new_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        losses.append(trained(tmp_path / name, model=model, **given, **fields).losses())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = trained(tmp_path / "plain", model=new_model(), dataset=documents(), per_device_train_batch_size=8)
    assert losses[0][0] > 2 * plain.losses()[0]


def test_evaluation_weights_all_tokens_equally(tmp_path):
    made = [new_trainer(tmp_path, eval_dataset=documents(count=5), image_weight=weight) for weight in (1.0, 5.0)]
    first, second = (one.evaluate()["eval_loss"] for one in made)
    assert first == pytest.approx(second)


@pytest.mark.parametrize(
    "model, given, message",
    [
        ({"num_images": 0}, {"kb": None}, "image_weight is for tokens that see images"),
        ({}, {"image_weight": float("nan")}, "image_weight must be a number from 0 on, got nan"),
        ({}, {"image_weight": -1.0}, "image_weight must be a number from 0 on"),
        ({}, {"label_smoothing_factor": 0.1}, "leave one of them out"),
        ({}, {"compute_loss_func": NextTokenLoss()}, "leave one of them out"),
    ],
)
def test_what_has_no_weighted_loss_is_refused(tmp_path, model, given, message):
    with pytest.raises(ValmError, match=message):
        new_trainer(tmp_path, **{"model": new_model(**model), "image_weight": 2.0} | given)
