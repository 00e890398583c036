import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.valm.augmented.models import VOCAB, augmented, random_ids, random_images, tiny_gpt2, tiny_llama
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
    model = augmented(base, unfreeze="all").train()
    call = inputs() | random_images(2, 9)
    expected = model(**call)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert limited(model).tokens.tolist() == TOKENS
    found = model(**call)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logits[..., : len(TOKENS)], expected.logits[..., TOKENS], rtol=1e-4, atol=1e-5)
    found.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_sample_stands_for_all_other_tokens(monkeypatch):
    monkeypatch.setattr(limited_softmax, "SAMPLED", 7)
    model = augmented().train()
    call = inputs() | random_images(2, 9)
    whole = model(**call).logits.double()
    limited(model)
    torch.manual_seed(0)
    draws = torch.stack([model(**call).logits.double().exp().sum(dim=-1) for _ in range(400)])  # (draws, B, T)
    assert model(**call).logits.shape == (2, 9, len(TOKENS) + 7)
    assert draws.std(dim=0).min() > 0, "every step draws the same"
    error = (draws.mean(dim=0) - whole.exp().sum(dim=-1)) / (draws.std(dim=0) / 20)
    assert error.abs().max() < 4.5


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
    with pytest.raises(ValmError, match="the tokens of a stream, which are not known before"):
        LimitedSoftmax(tiny_model(), iter([]))
    model = tiny_llama()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValmError, match="its head is Sequential"):
        limited(model)
