from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.model.decoders import VOCAB, augmented, random_ids, random_images, tiny_gpt2, tiny_llama
from tests.valm.models import tiny_model
from valm.errors import ValmError
from valm.training import limited_softmax
from valm.training.limited_softmax import LimitedSoftmax

TOKENS = [3, 5, 8, 13, 21, 34]


def inputs(seed=0):
    """Two rows of TOKENS; the labels of the first three tokens are ignored."""
    chosen = torch.randint(0, len(TOKENS), (2, 9), generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor(TOKENS)[chosen]
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def limited(model):
    return LimitedSoftmax(model, [{"input_ids": TOKENS[:4]}, {"input_ids": TOKENS[2:]}])


def gpt2_without_dropout(seed):
    return tiny_gpt2(seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.mark.parametrize("base", [tiny_llama, gpt2_without_dropout])
def test_with_all_other_tokens_in_the_sample_the_loss_is_that_of_the_whole_vocabulary(base):
    model = augmented(base).requires_grad_(True).train()
    call = inputs() | random_images(2, 9)
    expected = model(**call)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert limited(model).tokens.tolist() == TOKENS
    found = model(**call)
    assert_agree(found.loss, expected.loss)
    assert_agree(found.logits[..., : len(TOKENS)], expected.logits[..., TOKENS])
    found.loss.backward()
    for name, parameter in model.named_parameters():
        assert_agree(parameter.grad, gradients[name])


def test_autograd_does_not_copy_the_logits(monkeypatch):
    model = augmented().requires_grad_(True).train()
    softmax = limited(model)
    softmax._sampled = 7
    made = []
    own = softmax._loss_of_model
    softmax._loss_of_model = lambda logits, **more: made.append(logits.grad_fn.name()) or own(logits=logits, **more)
    model(**inputs(), **random_images(2, 9)).loss.backward()
    assert made and "CopySlices" not in made[0]
    assert model.lm_head.weight.grad.abs().sum() > 0


def scaled_granite():
    model = tiny("granite")
    model.config.logits_scaling = 4.0
    return model


@pytest.mark.parametrize("base", [tiny_llama, partial(tiny, "cohere"), partial(tiny, "gemma2"), scaled_granite])
def test_a_sample_stands_for_all_other_tokens(base, monkeypatch):
    """Also where the family scales (Cohere, Granite) or caps (Gemma 2) the logits of the head."""
    monkeypatch.setattr(limited_softmax, "SAMPLED", 7)
    model = base().eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(3)  # so that scale and cap matter
    whole = model(**inputs()).logits.double()
    found = limited(model)
    of_loss = []
    own_loss, found._loss_of_model = (
        found._loss_of_model,
        lambda logits, **more: of_loss.append(logits.detach().double()) or own_loss(logits, **more),
    )
    model.get_output_embeddings().train()
    torch.manual_seed(0)
    for _ in range(100):
        assert model(**inputs()).logits.shape == (2, 9, len(TOKENS) + 7)
    with torch.no_grad():  # as the base's pass
        model(**inputs())
    assert torch.equal(of_loss.pop(), of_loss[-1])
    draws = torch.stack(of_loss).exp().sum(dim=-1)  # (draws, B, T)
    assert draws.std(dim=0).min() > 0, "every step draws the same"
    error = (draws.mean(dim=0) - whole.exp().sum(dim=-1)) / (draws.std(dim=0) / 10)
    assert error.abs().max() < 4.5


class Centred(LlamaForCausalLM):
    """Its logits depend on the whole vocabulary."""

    def forward(self, labels=None, **arguments):
        out = super().forward(**arguments)
        out.logits = out.logits - out.logits.mean(dim=-1, keepdim=True)
        out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=VOCAB)
        return out


class OwnLoss(LlamaForCausalLM):
    """It does not compute its loss by `loss_function`."""

    def forward(self, labels=None, **arguments):
        out = super().forward(**arguments)
        out.loss = out.logits.log_softmax(dim=-1)[:, :-1, 3].mean()
        return out


@pytest.mark.parametrize("other", [Centred, OwnLoss])
def test_a_softmax_of_more_than_the_rows_of_the_head_is_refused(other):
    model = tiny_llama().train()
    model.__class__ = other
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValmError, match=f"the softmax of {other.__name__} cannot be limited: its logits or its loss"):
        limited(model)
    assert [module.training for module in model.modules()] == modes
    call = {"input_ids": random_ids(1, 4), "labels": random_ids(1, 4)}
    assert model.train()(**call).logits.shape[-1] == VOCAB, "the model is still changed"


def test_the_documents_may_have_every_token():
    model = augmented().train()
    call = inputs() | random_images(2, 9)
    expected = model(**call).loss
    LimitedSoftmax(model, [{"input_ids": list(range(VOCAB))}])
    torch.testing.assert_close(model(**call).loss, expected)


def test_evaluation_is_over_the_whole_vocabulary():
    model = augmented().eval()
    call = inputs() | random_images(2, 9)
    expected = model(**call)
    limited(model)
    found = model(**call)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    assert found.logits.shape[-1] == VOCAB


def test_the_model_is_saved_as_ever(tmp_path):
    model = augmented()
    names = list(model.state_dict())
    limited(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.train()(**inputs() | random_images(2, 9)).logits.shape[-1] == VOCAB


def test_a_token_of_no_document_is_an_error_and_not_ignored():
    model = augmented().train()
    limited(model)
    ids = random_ids(2, 9)
    with pytest.raises(IndexError, match="out of bounds"):
        model(ids, labels=ids, **random_images(2, 9))


def test_a_vocabulary_that_is_not_known_is_refused():
    with pytest.raises(ValmError, match="the tokens of a stream, since they are not known yet"):
        LimitedSoftmax(tiny_model(), iter([]))
    model = tiny_llama()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValmError, match="its head is Sequential"):
        limited(model)
