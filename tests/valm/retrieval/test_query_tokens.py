import pytest
import torch

from tests.valm.other_tokenizers import gpt2_like
from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import padded
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.query_tokens import asking_tokens, asks, noted, read_note
from valm.retrieval.retriever import Retriever

TOLERANCE = 2 * 2**-23  # two units in the last place of float32 at 1; the text tower runs in float64


@pytest.mark.parametrize(
    ("text", "expected"),
    {"Banana ": True, " the": False, "The": False, "?!": False, " ": False, "": False, "'s": False, "12": True}.items(),
)
def test_words_of_content_ask(text, expected):
    assert asks(text) == expected


def test_parts_of_a_word_ask_where_no_ends_are_marked(tokenizer):
    own = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), asking_tokens(tokenizer), strict=True))
    assert own["apple</w>"] and not own["app"] and not own["the</w>"] and not own[".</w>"]
    other = gpt2_like(["ban ban ban anas anas"], vocab_size=262)
    asking = asking_tokens(other)
    assert all(asking[id] for id in other("ban", add_special_tokens=False)["input_ids"])
    assert not any(asking[id] for id in (other.bos_token_id, *other(",", add_special_tokens=False)["input_ids"]))


def test_a_note_of_other_words_is_refused():
    assert [read_note(noted(rule)) for rule in ("every", "content")] == ["every", "content"]
    with pytest.raises(ValmError, match="of the rule 'content 0123', which this version does not have"):
        read_note("content 0123")


@pytest.fixture(scope="module", params=["own", "other"])
def encoders(request, clip):
    """With a query of each token, and of words of content alone."""
    tokenizer = None if request.param == "own" else gpt2_like([*TEXTS, "apple wood sky grass dogs bus"], vocab_size=320)
    return [
        ContextEncoder(clip, tokenizer=tokenizer, query_tokens=rule, dtype=torch.float64)
        for rule in ("every", "content")
    ]


def rows(encoder):
    """Documents, two of them in a row; the second begins with tokens that do not ask."""
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    first, second, third = (
        encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*TEXTS, "the, of a red apple is")
    )
    return [first, [bos, *third, eos, bos, *second], [bos, *second[:9]]]


def expected(encoders, row):
    """Those of each token, repeated where a token does not ask."""
    every, content = encoders
    queries, found = every(torch.tensor([row]))[0], []
    for query, id in zip(queries, row, strict=True):
        begins = not query.any()
        found.append(query if begins or content.asking[id] else found[-1])
    return torch.stack(found)


def close(found, truth):
    return found.shape == truth.shape and torch.allclose(found, truth, rtol=0, atol=TOLERANCE)


def test_a_token_that_does_not_ask_has_the_query_of_the_one_before(encoders):
    content = encoders[1]
    texts = rows(content)
    ids, mask = padded(texts)
    truth = [expected(encoders, row) for row in texts]
    assert any((query[2:] == query[1:-1]).all(-1).any() for query in truth)
    together = content(ids, mask)
    for row, (text, queries) in enumerate(zip(texts, truth, strict=True)):
        assert close(content(torch.tensor([text]))[0], queries)
        assert close(together[row, : len(text)], queries)
        assert close(content(torch.tensor([text[:7]]))[0], queries[:7])


@pytest.mark.parametrize("lengths", [[1] * 99, [7, 1, 1, 5, 1, 1, 1, 9, 99]])
def test_the_same_in_steps(encoders, lengths):
    content = encoders[1]
    for text in rows(content):
        cache, steps, at = content.new_cache(1), [], 0
        for length in lengths:
            if at < len(text):
                steps.append(content.step(torch.tensor([text[at : at + length]]), cache)[0])
                at += length
        assert close(torch.cat(steps), expected(encoders, text))


def test_images_are_searched_for_by_tokens_that_ask(encoders, make_kb, monkeypatch):
    kb = make_kb(6)
    content = Retriever(encoders[1], kb, 2, cache_tokens=0)
    asked = []
    search = content.index.search
    monkeypatch.setattr(content.index, "search", lambda queries, k: asked.append(len(queries)) or search(queries, k))
    for text in rows(encoders[1]):
        ids = torch.tensor([text])
        found, scores = content.find(ids)
        exact = content.index.search(expected(encoders, text), 2)
        seen = found[0, :, 0] >= 0
        assert torch.equal(found[0, seen], exact.indices[seen])
        torch.testing.assert_close(scores[0, seen], exact.scores[seen])
        assert asked[0] <= sum(encoders[1].asking[id] for id in text) < len(text)
        asked.clear()


def test_the_same_images_of_a_prompt_in_parts(encoders, make_kb):
    content = Retriever(encoders[1], make_kb(6), 2)
    ids = torch.tensor([[id for row in rows(encoders[1])[:2] for id in row]])
    found, _ = content.find(ids)
    seen = found[0, :, 0] >= 0
    for at in range(1, ids.shape[1], 3):
        state = content.start(1)
        parts = content.step(ids[:, :at], state), content.step(ids[:, at:], state)
        images = [torch.cat([part.image_ids, torch.tensor([-1])])[part.image_index[0]] for part in parts]
        assert torch.equal(torch.cat(images)[seen], found[0, seen]), at
