import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, random_images, tiny_llama, tiny_opt
from tests.valm.models import HashRetriever
from tests.valm.training.documents import TOKENIZER, documents, new_model, new_trainer, trained
from tests.valm.training.test_limited_softmax import gpt2_without_dropout, inputs, limited
from valm.errors import ValmError
from valm.training.next_token_loss import NextTokenLoss
from valm.training.word_weight import WordWeight

# Tokens of two words, at the beginning of a text and after a space.
TOKENS_OF = {"red": [3], " red": [5], "sea-green": [8, 13], " sea-green": [13, 8, 21]}


def weighted(base):
    model = augmented(base, unfreeze="all").train()
    WordWeight(model, ["red", "sea-green"], 3.0, lambda text, add_special_tokens: {"input_ids": TOKENS_OF[text]})
    return model


def call():
    """Four rows, with images at most tokens."""
    parts = [inputs(seed) for seed in (3, 4)]
    images = random_images(4, 9)
    images["image_index"][0, 4:6] = -1
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | images


def in_words(ids):
    """Whether each token belongs to a word."""
    found = [False] * len(ids)
    for word in TOKENS_OF.values():
        for start in range(len(ids)):
            if ids[start : start + len(word)] == word:
                found[start : start + len(word)] = [True] * len(word)
    return found


def by_hand(logits, labels, input_ids, image_index, weight):
    """The sum of the losses, token by token."""
    total = 0.0
    for row, ids in enumerate(input_ids.tolist()):
        for token, in_word in enumerate(in_words(ids)[1:]):
            if (target := labels[row, token + 1]) >= 0:
                of_token = F.cross_entropy(logits[row, token].double(), target)
                total += of_token * (weight if in_word and (image_index[row, token] >= 0).any() else 1)
    return total


@pytest.mark.parametrize("base", [tiny_llama, gpt2_without_dropout, tiny_opt])
def test_the_loss_of_a_word_is_multiplied_where_the_preceding_token_sees_an_image(base):
    model, given = weighted(base), call()
    found = model(**given)
    tokens = {name: given[name] for name in ("labels", "input_ids", "image_index")}
    expected, plain = (by_hand(found.logits, **tokens, weight=weight) for weight in (3.0, 1.0))
    assert expected > 1.5 * plain
    assert_agree(found.loss, (expected / 24).float())  # six tokens of each row have labels
    assert_agree(model(**given, num_items_in_batch=torch.tensor(5.0)).loss, (expected / 5).float())
    assert_agree(model.eval()(**given).loss, (plain / 24).float())
    model.train()(**{name: value for name, value in given.items() if name != "labels"})
    assert_agree(model.eval()(**given).loss, (plain / 24).float())


def test_it_is_also_the_loss_of_a_limited_softmax():
    model, given = weighted(gpt2_without_dropout), call()
    expected = model(**given).loss
    limited(model)._sampled = 1 << 20  # all other tokens
    assert_agree(model(**given).loss, expected)


def test_a_short_text_contains_no_long_word():
    model = weighted(gpt2_without_dropout)
    given = {name: value[:, :2] for name, value in call().items() if name != "image_pool"}
    images = {"image_pool": random_images(4, 9)["image_pool"]}
    assert model(**given | {"labels": given["input_ids"]} | images).loss.isfinite()


@pytest.mark.parametrize("limit_softmax", [False, True])
def test_the_loss_of_a_step_is_the_same_in_any_batch(tmp_path, limit_softmax):
    losses = []
    for name, sizes in (("whole", (8, 1)), ("parts", (2, 4))):
        fields = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1], "max_steps": 3}
        given = {"dataset": documents(), "image_words": ["red", "blue"], "limit_softmax": limit_softmax}
        model = new_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        losses.append(trained(tmp_path / name, model=model, **given, **fields).losses())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = trained(tmp_path / "plain", model=new_model(), dataset=documents(), per_device_train_batch_size=8)
    assert losses[0][0] > 1.2 * plain.losses()[0]


def test_a_model_that_retrieves_while_it_trains(tmp_path):
    def first_loss(**given):
        model = new_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model.set_retriever(HashRetriever())
        return trained(tmp_path, model=model, kb=None, max_steps=1, **given).losses()[0]

    assert first_loss(image_words=["red", "blue"]) > 1.2 * first_loss()


def test_evaluation_weights_all_tokens_equally(tmp_path):
    made = [new_trainer(tmp_path, eval_dataset=documents(count=5), image_words=words) for words in ((), ("red",))]
    first, second = (one.evaluate()["eval_loss"] for one in made)
    assert first == pytest.approx(second)


@pytest.mark.parametrize(
    "model, given, message",
    [
        ({"num_images": 0}, {"kb": None}, "image_word_weight is for a model that sees images, but this"),
        ({}, {"image_word_weight": float("inf")}, "image_word_weight must be a finite number from 0 on, got inf"),
        ({}, {"image_words": "red"}, "image_words must be a list of words, got 'red'"),
        ({}, {"image_word_weight": -1.0}, "image_word_weight must be a finite number from 0 on"),
        ({}, {"label_smoothing_factor": 0.1}, "image_words change the model's own loss"),
        ({}, {"compute_loss_func": NextTokenLoss()}, "image_words change the model's own loss"),
    ],
)
def test_what_has_no_weighted_loss_is_refused(tmp_path, model, given, message):
    with pytest.raises(ValmError, match=message):
        new_trainer(tmp_path, **{"model": new_model(**model), "image_words": ["red"]} | given)


def test_a_model_that_computes_its_loss_itself_is_refused():
    model = augmented(tiny_llama)
    own = model.forward
    model.forward = lambda labels=None, **call: own(**call)
    with pytest.raises(ValmError, match="cannot be weighted: leave image_words out"):
        WordWeight(model, ["red"], 2.0, TOKENIZER)
