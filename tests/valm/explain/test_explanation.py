import numpy as np
import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.model.decoders import tiny_gpt2
from tests.valm.other_tokenizers import gpt2_like, llama_like
from valm.clip.tokenizer import prompt_ids
from valm.errors import ValmError
from valm.evaluation.controls import RandomImages
from valm.evaluation.scoring import answer_log_probs
from valm.explain.explanation import MAX_TOKENS, Reader, explain, explain_together
from valm.model.augment import augment
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

TEXT = "a red apple lies on the"


def test_an_explanation_holds_what_the_model_computes(model, tokenizer, kb):
    explanation = explain(model, tokenizer, TEXT)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    found = model.retriever(ids)
    text, images = model.fusion_attention(ids, found.image_pool, found.image_index)
    assert explanation.tokens == ("(start)", "a", "red", "apple", "lies", "on", "the")
    np.testing.assert_array_equal(explanation.text_weights, text[0])
    np.testing.assert_array_equal(explanation.image_weights, images[0])
    np.testing.assert_array_equal(explanation.scores, found.scores[0])
    assert_agree(explanation.text_weights[2].sum(-1) + explanation.image_weights[2].sum(-1), 1)
    ids_of_last = found.image_ids[found.image_index[0, -1]].tolist()
    assert [image.caption for image in explanation.images_of(-1)] == [kb.item(id).uri for id in ids_of_last]
    assert explanation.images_of(-1)[0].thumbnail is not None and explanation.note == ""
    probabilities = model(ids).logits[0, -1].softmax(-1)
    for word, probability in zip(explanation.answers, explanation.probabilities, strict=True):
        (id,) = tokenizer(word, add_special_tokens=False).input_ids
        assert_agree(probability, probabilities[id].item())
    assert list(explanation.probabilities) == sorted(explanation.probabilities, reverse=True)


def test_a_model_in_training_mode_is_explained_without_dropout(model, tokenizer):
    expected = explain(model, tokenizer, TEXT).probabilities
    model.train()
    try:
        found = explain(model, tokenizer, TEXT).probabilities
        assert model.training and all(module.training for module in model.transformer.h)
    finally:
        model.eval()
    np.testing.assert_array_equal(found, expected)


def test_given_answers_may_have_several_tokens(model, tokenizer):
    answers = ["red apple", "blue", "red", "red apple lies"]
    explanation = explain(model, tokenizer, TEXT, answers=answers)
    expected = answer_log_probs(model, tokenizer, [TEXT], answers)[0].exp()
    assert explanation.answers == tuple(answers)
    assert_agree(explanation.probabilities, expected)


def test_a_note_says_what_images_there_are(make_model, model, tokenizer):
    none = explain(make_model(0), tokenizer, TEXT)
    assert "K = 0" in none.note and none.images == ()
    assert_agree(none.text_weights.sum(-1), 1)
    off = explain(model, tokenizer, TEXT, with_images=False)
    assert "switched off" in off.note and off.image_index.shape == (7, 0)
    pool, index = torch.zeros(0, model.fusion_options.image_dim), torch.zeros(1, 7, 0, dtype=torch.int64)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    probability = model(ids, image_pool=pool, image_index=index).logits[0, -1].softmax(-1).max()
    assert off.probabilities.max() <= probability.item() * (1 + 1e-5)
    blind = explain(make_model(1, blind=True), tokenizer, TEXT)
    assert "Blind" in blind.note and blind.image_weights.shape == (4, 7, 1)
    assert {image.caption for image in blind.images} == {"the token's own query"}


@pytest.mark.parametrize("make_tokenizer", [gpt2_like, llama_like])
def test_another_tokenizer_is_explained_too(clip, kb, make_tokenizer):
    """Tokens with a blank before them are shown without it, and answers are words of one token."""
    own = make_tokenizer()
    decoder = tiny_gpt2()
    decoder.resize_token_embeddings(len(own))
    model = augment(decoder, clip.embed_dim, 2, logit_bias=0.0)
    model.set_retriever(Retriever(ContextEncoder(clip, tokenizer=own), kb, 2))
    explanation = explain(model, own, "A red apple")
    assert explanation.image_weights.max() > 0
    total = explanation.text_weights.sum(-1) + explanation.image_weights.sum(-1)
    assert_agree(total, 1)
    ids = torch.tensor([prompt_ids(own, "A red apple")])  # as in training
    assert len(explanation.tokens) == ids.shape[1] and explanation.tokens[-1] == "apple"
    assert all(token == token.strip() != "" for token in explanation.tokens)
    probabilities = model(ids).logits[0, -1].softmax(-1)
    assert explanation.answers
    for word, probability in zip(explanation.answers, explanation.probabilities, strict=True):
        id = own(f": {word}", add_special_tokens=False).input_ids[-1]
        assert_agree(probability, probabilities[id].item())
    given = explain(model, own, "A red apple", answers=explanation.answers[:3])
    assert_agree(given.probabilities, explanation.probabilities[:3])


def test_another_retriever_changes_images_and_answers(model, tokenizer):
    own = explain(model, tokenizer, TEXT)
    other = explain(model, tokenizer, TEXT, retriever=RandomImages(model.retriever, seed=3))
    assert [image.caption for image in own.images_of(-1)] != [image.caption for image in other.images_of(-1)]
    assert not np.allclose(own.probabilities, other.probabilities)
    assert explain(model, tokenizer, TEXT).answers == own.answers  # the model has its own again


def test_readers_side_by_side_have_the_same_answers(model, make_model, tokenizer):
    readers = {"valm": Reader(model, tokenizer), "gpt2": Reader(make_model(0), tokenizer)}
    together = explain_together(readers, TEXT)
    assert together["valm"].answers == together["gpt2"].answers and len(together["valm"].answers) == 10
    first = list(together["valm"].probabilities)
    assert first == sorted(first, reverse=True)
    alone = [explain(model, tokenizer, TEXT), explain(make_model(0), tokenizer, TEXT)]
    for explanation, own in zip(together.values(), alone, strict=True):
        shared = dict(zip(explanation.answers, explanation.probabilities, strict=True))
        for word, probability in zip(own.answers, own.probabilities, strict=True):
            assert_agree(shared.get(word, probability), probability)
        assert own.answers[0] in shared


@pytest.mark.parametrize(
    "text, answers, expected",
    [
        ("", None, "the prompt is empty"),
        ("a red apple " * 8, None, "the prompt is 25 tokens long, and this model reads 24 at most"),
        (TEXT, ["red", " "], "the answer ' ' has no tokens"),
        (TEXT, ["red " * 19], "the prompt followed by an answer is 25 tokens long, and this model reads 24 at most"),
    ],
)
def test_wrong_texts_are_named(model, tokenizer, text, answers, expected):
    with pytest.raises(ValmError, match=expected):
        explain(model, tokenizer, text, answers=answers)


def test_wrong_models_are_named(make_model, tokenizer):
    with pytest.raises(ValmError, match=f"151 tokens long, and an explanation shows {MAX_TOKENS} at most"):
        explain(make_model(0, n_positions=200), tokenizer, "red " * 150)
    model = make_model()
    model.set_retriever(None)
    with pytest.raises(ValmError, match=r"takes 3 images a token, but has no retriever.*--kb"):
        explain(model, tokenizer, TEXT)
