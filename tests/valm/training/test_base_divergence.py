import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, random_images, tiny_gpt2, tiny_llama, tiny_opt
from tests.valm.models import HashRetriever
from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model
from tests.valm.training.test_limited_softmax import gpt2_without_dropout, inputs, limited
from valm.errors import ValmError
from valm.model.augment import fusion_layer
from valm.model.probe import decoder_layers
from valm.training.base_divergence import BaseDivergence
from valm.training.cache_below import cache_below, no_images
from valm.training.train import trainer, training_arguments

WEIGHT = 3.0
LABELS = 12  # predicted tokens of `inputs`


def disturbed(base):
    """An augmented decoder whose images change its logits."""
    model = augmented(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_bias_delta" in name:
                parameter.fill_(12)
    return model.train()


def by_hand(model, call):
    """Cross entropy and divergence, each summed over the predicted tokens, in float64."""
    with torch.no_grad():
        found = model.eval()(**call).logits.double()
        base = model(**call | no_images(model, call["input_ids"])).logits.double()
    model.train()
    following = F.pad(call["labels"], (0, 1), value=-100)[:, 1:]
    here = following >= 0
    entropy = F.cross_entropy(found[here], following[here], reduction="sum")
    p, q = base[here].softmax(-1), found[here].log_softmax(-1)
    return entropy, (p * (p.log() - q)).sum()


@pytest.mark.parametrize("base", [tiny_llama, gpt2_without_dropout, tiny_opt])
def test_the_loss_is_the_cross_entropy_and_the_divergence_from_the_base(base):
    model, call = disturbed(base), inputs() | random_images(2, 9)
    entropy, divergence = by_hand(model, call)
    assert divergence > 0.01 * LABELS
    BaseDivergence(model, WEIGHT)
    assert_agree(model(**call).loss, ((entropy + WEIGHT * divergence) / LABELS).float())
    given = torch.tensor(5.0)
    assert_agree(model(**call, num_items_in_batch=given).loss, ((entropy + WEIGHT * divergence) / 5).float())
    assert_agree(model.eval()(**call).loss, (entropy / LABELS).float())
    with torch.no_grad():
        assert_agree(model.train()(**call).loss, (entropy / LABELS).float())


def test_the_gradient_is_that_of_both_terms():
    model, call = disturbed(tiny_llama), inputs() | random_images(2, 9)
    found = model(**call).logits.float()
    base = model(**call | no_images(model, call["input_ids"])).logits.float().detach()
    here = F.pad(call["labels"], (0, 1), value=-100)[:, 1:] >= 0
    p, q = base[here].softmax(-1), found[here].log_softmax(-1)
    (model(**call).loss + WEIGHT * (p * (p.log() - q)).sum() / LABELS).backward()
    expected = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    model.zero_grad()
    BaseDivergence(model, WEIGHT)
    model(**call).loss.backward()
    for name, parameter in model.named_parameters():
        assert_agree(parameter.grad, expected[name]) if parameter.requires_grad else None
    assert all(one.abs().max() > 0 for one in expected.values())


def test_text_without_images_has_no_divergence_even_with_dropout_in_the_base():
    model = augmented(gpt2_without_dropout).train()
    call = inputs() | no_images(model, inputs()["input_ids"])
    expected = model(**call).loss
    BaseDivergence(model, WEIGHT)
    assert torch.equal(model(**call).loss, expected)
    dropping = disturbed(lambda seed: tiny_gpt2(seed, resid_pdrop=0.5))
    BaseDivergence(dropping, WEIGHT)
    assert all(module.training for module in dropping.modules())
    assert torch.isfinite(dropping(**inputs(), **random_images(2, 9)).loss)
    assert all(module.training for module in dropping.modules())


def test_it_is_also_the_loss_of_a_limited_softmax_from_cached_states(tmp_path):
    model, images = disturbed(tiny_llama), random_images(2, 9)
    call = inputs() | images
    BaseDivergence(model, WEIGHT)
    expected = model(**call).loss
    rows = [{"input_ids": row.numpy()} for row in call["input_ids"]]
    cached = cache_below(model, rows, tmp_path, progress=False)
    states = torch.stack([torch.from_numpy(cached[row]["fusion_input"].copy()) for row in range(2)])
    assert fusion_layer(model) > 0
    ran = []
    hook = decoder_layers(model)[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    assert_agree(model(**call, fusion_input=states).loss, expected)
    assert not ran, "the pass of the base ran the layers below"
    hook.remove()
    limited(model)._sampled = 1 << 20  # all other tokens
    assert_agree(model(**call, fusion_input=states).loss, expected)
    torch.manual_seed(0)
    limited_loss = model(**call).loss
    assert torch.isfinite(limited_loss)


def test_a_model_that_retrieves_while_it_trains_is_compared_with_the_base_too():
    model, call = disturbed(tiny_llama), inputs()
    model.set_retriever(HashRetriever())
    plain = model(**call).loss
    BaseDivergence(model, WEIGHT)
    assert model(**call).loss > plain
    assert_agree(model.eval()(**call).loss, plain)


def test_a_base_that_trains_and_another_loss_are_refused(tmp_path):
    with pytest.raises(ValmError, match=r"frozen base, but .* trains: freeze it, or set base_kl to 0"):
        BaseDivergence(augmented().requires_grad_(True), WEIGHT)
    with pytest.raises(ValmError, match=r"frozen base, but model\.embed_tokens\.weight trains"):
        BaseDivergence(tiny_llama(), WEIGHT)  # a decoder that sees no images
    arguments = training_arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1, report_to="none")
    given = {"tokenizer": TOKENIZER, "base_kl": 1.0}
    with pytest.raises(ValmError, match=r"leave these out, or set base_kl \(--base-kl\) to 0"):
        trainer(new_model(), documents(), Vectors(), arguments=arguments, **given)
