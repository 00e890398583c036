import copy

import numpy as np
import pytest
import torch

from tests.valm.models import tiny_model
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.corpus.retrieved import retrieve_texts
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm.training import distill
from valm.training.blocks import Blocks
from valm.training.distill import distill_queries, query_loss

SETTINGS = {"steps": 60, "batch_size": 4, "lr": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def world(clip, make_kb, tmp_path_factory):
    """A model's parts: make_model, tokenizer, corpus, kb, encoder."""
    encoder = ContextEncoder(clip)
    kb = make_kb(30)
    words = " ".join(TEXTS).split()
    texts = [" ".join(words[start : start + 9]) for start in range(0, len(words) - 9, 2)]
    corpus = retrieve_texts(texts, Retriever(encoder, kb, 3), tmp_path_factory.mktemp("retrieval"), progress=False)

    def make_model(**arguments):
        ids = {"bos_token_id": clip.tokenizer.bos_token_id, "eos_token_id": clip.tokenizer.eos_token_id}
        return tiny_model(vocab_size=len(clip.tokenizer), image_dim=clip.embed_dim, **ids, **arguments)

    return make_model, clip.tokenizer, corpus, kb, encoder


def test_the_head_learns_and_nothing_else_changes(world):
    make_model, *rest = world
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    untrained = distill_queries(model, *rest, **{**SETTINGS, "steps": 1, "lr": 1e-9})
    again = make_model()
    trained = distill_queries(again, *rest, **SETTINGS)
    assert trained.tokens == untrained.tokens > 5
    assert trained.cosine > untrained.cosine + 0.5
    assert trained.overlap > 3 * (3 / 30) > untrained.overlap  # 3 / 30: by chance
    after = again.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(parameter.grad is None for name, parameter in again.named_parameters() if "query_head" not in name)
    assert again.config.query_clip == rest[-1].clip.weights_hash
    third = make_model()
    assert distill_queries(third, *rest, **SETTINGS) == trained
    assert all(torch.equal(third.state_dict()[name], weight) for name, weight in after.items())


@pytest.mark.parametrize("n_positions", [32, 6])  # in the second a document has several blocks
def test_the_agreement_is_that_of_the_held_out_documents(world, monkeypatch, n_positions):
    make_model, tokenizer, corpus, kb, encoder = world
    model = make_model(n_positions=n_positions)
    monkeypatch.setattr(distill, "HELD_OUT", 0.5)
    found = distill_queries(model, tokenizer, corpus, kb, encoder, **SETTINGS)
    _, held_out = distill.hold_out(corpus, 0.5, 0)
    cosines, shares = [], []
    for document in Blocks(held_out, n_positions, tokenizer.bos_token_id):
        ids = torch.from_numpy(document["input_ids"].astype(np.int64))[None]
        cosines += (model.self_queries(ids) * encoder(ids)).sum(-1)[0, 1:].tolist()  # the first token has no query
        ids_found = model.retriever.find(ids)[0][0, 1:].tolist()
        pairs = zip(ids_found, document["image_ids"][1:].tolist(), strict=True)
        shares += [len({*own} & {*theirs}) / 3 for own, theirs in pairs]
    assert found.tokens == len(cosines)
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-4)
    assert found.overlap == pytest.approx(np.mean(shares), abs=1e-6)


def test_a_min_score_of_clips_queries_is_named(world):
    make_model, *rest = world
    with pytest.warns(UserWarning, match=r"the model's min_score, 0\.3, is of CLIP's queries: choose it anew"):
        distill_queries(make_model(min_score=0.3), *rest, **SETTINGS | {"steps": 1})


def test_the_agreement_is_measured_on_so_many_blocks(world, monkeypatch):
    make_model, *rest = world
    monkeypatch.setattr(distill, "HELD_OUT", 0.5)
    monkeypatch.setattr(distill, "MOST_HELD_OUT", 2)
    found = distill_queries(make_model(n_positions=6), *rest, **SETTINGS | {"steps": 1})
    assert found.tokens == 2 * (6 - 1)  # of two documents of ten tokens, without the first of each block


def test_the_loss_is_0_for_clips_own_queries_and_sees_the_order_of_images():
    torch.manual_seed(0)
    queries, images = (torch.nn.functional.normalize(torch.randn(n, 8), dim=-1) for n in (5, 20))
    assert query_loss(queries, queries, images, 20.0).item() == pytest.approx(0, abs=1e-5)
    other = torch.nn.functional.normalize(queries + 0.1 * torch.randn(5, 8), dim=-1)
    softmax = (20 * queries @ images.T).softmax(-1), (20 * other @ images.T).softmax(-1)
    expected = (1 - (queries * other).sum(-1)).mean() + (softmax[0] * (softmax[0] / softmax[1]).log()).sum(-1).mean()
    torch.testing.assert_close(query_loss(other, queries, images, 20.0), expected)


def test_what_does_not_belong_together_is_refused(world, make_kb, tmp_path):
    make_model, tokenizer, corpus, kb, encoder = world
    with pytest.raises(ValmError, match="was retrieved from another knowledge base"):
        distill_queries(make_model(), tokenizer, corpus, make_kb(5), encoder, **SETTINGS)
    with pytest.raises(
        ValmError, match=r"was retrieved with \{'overlap': \d+, 'min_tokens': \d+\}, and the encoder has"
    ):
        distill_queries(make_model(), tokenizer, corpus, kb, ContextEncoder(encoder.clip, min_tokens=3), **SETTINGS)
    with pytest.raises(ValmError, match="was retrieved with 'eot' queries, not with 'state' ones"):
        distill_queries(make_model(), tokenizer, corpus, kb, ContextEncoder(encoder.clip, query="state"), **SETTINGS)
    with pytest.raises(ValmError, match="was built with the CLIP"):
        foreign = ContextEncoder(make_clip(tokenizer, seed=1))
        distill_queries(make_model(), tokenizer, corpus, kb, foreign, **SETTINGS)
    with pytest.raises(ValmError, match="a query head needs retrieved images"):
        distill_queries(make_model(num_images=0), tokenizer, corpus, kb, encoder, **SETTINGS)
    with pytest.raises(ValmError, match="the loss of step 2 is nan: try a smaller learning rate"):
        distill_queries(make_model(), tokenizer, corpus, kb, encoder, **{**SETTINGS, "lr": 1e30})
