import pytest
import torch
from transformers import BartConfig, BartForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.tolerance import assert_agree
from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model, new_trainer, trained
from tests.valm.training.test_train import plain_llama
from valm.errors import ValmError
from valm.model.augment import augment
from valm.training.next_token_loss import NextTokenLoss, has_next_token_loss

SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 64}


def bart():
    """A decoder whose own loss is of each token with its own logits."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    return BartForCausalLM(BartConfig(**SIZES, **sizes, dropout=0.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_transformers(smoothing):
    model, labels = plain_llama(), torch.randint(0, len(TOKENIZER), (2, 9))
    labels[0, 5:] = -100
    outputs = model(labels.clamp(min=0), labels=labels)
    expected = outputs.loss
    if smoothing:
        log_probs = outputs.logits[:, :-1].log_softmax(-1)[labels[:, 1:] >= 0]
        expected = (1 - smoothing) * expected - smoothing * log_probs.mean()
    torch.testing.assert_close(NextTokenLoss(smoothing)(outputs, labels), expected)
    summed = NextTokenLoss(smoothing)(tuple(outputs.values())[1:], labels, torch.tensor(3))
    torch.testing.assert_close(summed, expected * (labels[:, 1:] >= 0).sum() / 3)


def test_models_whose_loss_is_another_one_are_found():
    mixture = MixtralForCausalLM(
        MixtralConfig(**SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                      intermediate_size=32, num_local_experts=2, output_router_logits=True)
    )  # fmt: skip
    assert all(has_next_token_loss(model) for model in (plain_llama(), new_model(), mixture))
    assert not has_next_token_loss(bart())
    model = plain_llama().train()
    state = torch.get_rng_state()
    has_next_token_loss(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_smoothed_labels_are_of_the_next_token(tmp_path):
    """The Trainer shifts them for the classes alone that it knows by name."""
    made = trained(tmp_path, max_steps=60, eval_dataset=documents(), label_smoothing_factor=0.1)
    unsmoothed = new_trainer(tmp_path / "other", model=made.model, eval_dataset=documents())
    assert_agree(made.evaluate()["eval_loss"], unsmoothed.evaluate()["eval_loss"])
    assert made.evaluate()["eval_loss"] < 2.2  # 4.0 for what the shift of another class makes of it
    assert made.losses()[-1] < 0.7 * made.losses()[0]


@pytest.mark.parametrize("limit_softmax", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_a_decoder_of_barts_kind_is_refused(tmp_path, augmented, limit_softmax):
    model, kb = (augment(bart(), Vectors.dim, 3), Vectors()) if augmented else (bart(), None)
    with pytest.raises(ValmError, match="does not compute the loss of the next token"):
        new_trainer(tmp_path, model=model, kb=kb, limit_softmax=limit_softmax)


def test_a_loss_of_the_user_stays(tmp_path):
    def zero(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * 0

    made = new_trainer(tmp_path, model=bart(), kb=None, compute_loss_func=zero)
    assert made.compute_loss_func is zero
    with pytest.raises(ValmError, match=r"limit_softmax changes the model's own loss, which .* compute_loss_func re"):
        new_trainer(tmp_path, compute_loss_func=zero, limit_softmax=True)  # it would read other logits than it knows
