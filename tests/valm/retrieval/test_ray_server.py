"""What a server of images answers, called directly; tests/valm/cli/test_serve.py has it on a Ray cluster."""

import asyncio
import sys
import threading

import pytest
import torch

from tests.valm.other_tokenizers import gpt2_like
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval import ray_server
from valm.retrieval.context import ContextEncoder
from valm.retrieval.ray_server import RetrievalServer, ServedEncoder, ServedRetriever, _Server
from valm.retrieval.retriever import Retriever
from valm.retrieval.segments import Run

K = 3


class Direct(RetrievalServer):
    """The server without Ray: `calls` of its methods in turn."""

    def __init__(self, server):
        self.name = "direct"
        self.server = server
        self.calls = []

    def ask(self, method, *arguments):
        self.calls.append((method, *arguments))
        return asyncio.run(getattr(self.server, method)(*arguments))


@pytest.fixture(scope="module")
def source(clip, make_kb, tmp_path_factory):
    """The folders of a knowledge base and its CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    clip.save(folder)
    return make_kb(30).path, str(folder)


@pytest.fixture
def server(source):
    return _Server(*source, False, "cpu", torch.float32)


@pytest.fixture(params=["CLIP's tokenizer", "another tokenizer"])
def either_tokenizer(request, tokenizer):
    return tokenizer if request.param == "CLIP's tokenizer" else gpt2_like()


def padded_left(tokenizer, texts=TEXTS):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def same(found, expected):
    """The same images, with scores that differ by rounding."""
    for name in ("image_pool", "image_index", "image_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("query", ["eot", "state"])
def test_images_are_those_of_a_local_retriever(server, clip, source, either_tokenizer, query):
    kb = ImageKnowledgeBase.open(source[0])
    local = Retriever(ContextEncoder(clip, tokenizer=either_tokenizer, query=query), kb, K)
    direct = Direct(server)
    served = direct.retriever(either_tokenizer, K, query)
    ids, mask = padded_left(either_tokenizer)
    same(served(ids, mask), local(ids, mask))
    direct.calls.clear()
    same(served(ids, mask), local(ids, mask))
    assert not direct.calls  # cached by the client too
    queries = local.encoder(ids, mask)
    same(served.retrieve(queries), local.retrieve(queries))


@pytest.mark.parametrize("query", ["eot", "state"])
def test_step_by_step(server, clip, source, either_tokenizer, query):
    """Over ends of segments, with rows that begin later than others and are exchanged, as a beam search does it."""
    kb = ImageKnowledgeBase.open(source[0])
    local = Retriever(ContextEncoder(clip, tokenizer=either_tokenizer, query=query), kb, K)
    served = Direct(server).retriever(either_tokenizer, K, query)
    ids, mask = padded_left(either_tokenizer, [TEXTS[0], TEXTS[1][:40]])
    states = local.start(2), served.start(2)
    for columns in torch.arange(ids.shape[1]).split([5, *[1] * (ids.shape[1] - 5)]):
        expected, found = (
            retriever.step(ids[:, columns], state, mask[:, columns])
            for retriever, state in zip((local, served), states, strict=True)
        )
        same(found, expected)
        for state in states:
            state.reorder(torch.tensor([1, 0]))
        ids, mask = ids.flip(0), mask.flip(0)
    with pytest.raises(ValueError, match="input_ids has 1 rows, the cache 2"):
        served.step(ids[:1], states[1])


def keys_of(clip, texts):
    ids, mask = padded_left(clip.tokenizer, texts)
    return [run.key() for run in ContextEncoder(clip).runs(ids, mask)]


async def asked(server, requests, cancel=()):
    """What `server` answers to all `requests` made at once, those in `cancel` given up at once; errors as values."""
    begin = threading.Event()
    server._thread.submit(begin.wait)
    tasks = [asyncio.create_task(server.find(*request)) for request in requests]
    await asyncio.sleep(0)  # all are asked
    for number in cancel:
        tasks[number].cancel()
    await asyncio.sleep(0)
    begin.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def batches(server, monkeypatch):
    """How many requests each batch had."""
    seen = []
    find = server._find
    monkeypatch.setattr(server, "_find", lambda batch: seen.append(len(batch)) or find(batch))
    return seen


def test_requests_of_several_clients_are_one_batch(server, clip, batches, monkeypatch):
    requests = [([key for text in some for key in keys_of(clip, [text])], K, "eot") for some in (TEXTS, TEXTS[1:])]
    alone = [asyncio.run(server.find(*request)) for request in requests]
    server._retriever.cache_clear()
    batches.clear()
    for found, expected in zip(asyncio.run(asked(server, requests)), alone, strict=True):
        assert (found[0] == expected[0]).all() and abs(found[1] - expected[1]).max() < 1e-5
    assert batches == [2]
    other = (requests[0][0], K + 1, "eot")
    found = asyncio.run(asked(server, [requests[0], other, requests[1]]))
    assert [one[0].shape[1] for one in found] == [K, K + 1, K] and batches == [2, 1, 1, 1]
    monkeypatch.setattr(ray_server, "BATCH_SEGMENTS", len(requests[0][0]))
    asyncio.run(asked(server, requests))
    assert batches == [2, 1, 1, 1, 1, 1]


def test_a_client_that_fails_or_ends_loses_nobody_elses_answer(server, clip, batches):
    good = (keys_of(clip, TEXTS), K, "eot")
    expected = asyncio.run(server.find(*good))
    server._retriever.cache_clear()
    bad = ([Run(0, [1 << 20], 0, [(0, 0)]).key()], K, "eot")
    found = asyncio.run(asked(server, [good, bad, good, good], cancel=[2]))
    assert isinstance(found[1], Exception) and isinstance(found[2], asyncio.CancelledError)
    for one in (found[0], found[3]):
        assert (one[0] == expected[0]).all()
    assert batches[1:] == [3, 1, 1, 1]


def test_wrong_arguments(server, source, tokenizer, make_kb, tmp_path):
    direct = Direct(server)
    with pytest.raises(ValmError, match="k must be from 1 to the 30 images"):
        direct.retriever(tokenizer, 31)
    for options, kind in (({"blind": True}, "blind"), ({"query": "self"}, "one with a query head")):
        with pytest.raises(ValmError, match=f"and this model is {kind}: give a folder as kb"):
            direct.retriever(tokenizer, K, **options)
    encoder = ServedEncoder(direct, tokenizer, "eot")
    with pytest.raises(
        ValmError, match=r"the server 'direct' searches .* as that was when it started, and nothing else"
    ):
        ServedRetriever(encoder, make_kb(5), K)
    with pytest.raises(ValmError, match="no knowledge base at"):
        Direct(_Server(tmp_path / "nothing", None, False, "cpu", torch.float32)).about  # noqa: B018
    other = tmp_path / "clip"
    make_clip(tokenizer, seed=1).save(other)
    with pytest.raises(ValmError, match="was built with the CLIP"):
        Direct(_Server(source[0], str(other), False, "cpu", torch.float32)).about  # noqa: B018


def test_without_ray_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[ray\]'"):
        RetrievalServer("x")
