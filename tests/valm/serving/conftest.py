"""A tiny VaLM with its retriever, and a substitute model that generates one letter after the other."""

import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from tests.valm.models import model_of
from tests.valm.other_tokenizers import gpt2_like, llama_like
from valm.clip.tokenizer import load_tokenizer
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm.serving import engine
from valm.serving.batch import Seen
from valm.serving.text import StreamedText


@pytest.fixture(scope="session")
def make_served(clip, make_kb, tmp_path_factory):
    """Model and tokenizer, as `valm.load` returns them."""
    kb = make_kb(30)

    def make(make_tokenizer=None):
        tokenizer = clip.tokenizer
        if make_tokenizer is not None:
            folder = tmp_path_factory.mktemp("tokenizer")
            make_tokenizer().save_pretrained(folder)
            tokenizer = load_tokenizer(folder)
        model = model_of(tokenizer, image_dim=clip.embed_dim, n_positions=192)
        model.set_retriever(Retriever(ContextEncoder(clip, tokenizer=tokenizer), kb, 3))
        return model, tokenizer

    return make


@pytest.fixture(
    scope="session",
    params=[None, pytest.param(gpt2_like, marks=pytest.mark.slow), pytest.param(llama_like, marks=pytest.mark.slow)],
)
def served(request, make_served):
    return make_served(request.param)


class Letters:
    """A model that continues with "a", "b", ..., and its tokenizer, in which a letter's id is its code. `go` allows a
    number of further tokens."""

    eos_token_id = bos_token_id = 0
    chat_template = retriever = None
    added_tokens_decoder: ClassVar = {}
    device = torch.device("cpu")
    dtype = torch.float32
    fusion_options = SimpleNamespace(num_images=0)
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=1000))
    generation_config = SimpleNamespace(eos_token_id=0)

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error = None
        self.batches = []  # the rows of each step
        self.prompts = []  # the tokens of prompts read together

    def __call__(self, text, **options):
        return {"input_ids": list(map(ord, text))}


class LettersBatch:
    """The `Batch` of `Letters`."""

    def __init__(self, model, positions=False):
        self.model, self.counts = model, []

    def begin(self, texts, all_logits=False):
        self.counts = [0] * len(texts)
        self.model.prompts.append(list(map(len, texts)))
        self.model.begun.release()
        return self._next()

    def read(self, ids):
        self.model.batches.append(len(self.counts))
        return self._next()

    def _next(self):
        for _ in self.counts:
            assert self.model.go.acquire(timeout=60)
        if self.model.error is not None:
            raise self.model.error
        logits = torch.zeros(len(self.counts), 1, 200)
        for row, count in enumerate(self.counts):
            logits[row, 0, 97 + count % 26] = 1
        self.counts = [count + 1 for count in self.counts]
        return Seen(logits, None, None)

    def join(self, other):
        self.counts += other.counts

    def keep(self, rows):
        self.counts = [self.counts[row] for row in rows]


class LettersText(StreamedText):
    def __init__(self, tokenizer, prompt, stop=()):
        self.stop, self.stopped, self._waiting = stop, False, ""

    def add(self, id):
        return self._until_stop(chr(id))

    def rest(self):
        return self._waiting


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(engine, "Batch", LettersBatch)
    monkeypatch.setattr(engine, "StreamedText", LettersText)
    monkeypatch.setattr(engine, "can_join", lambda model, positions: True)
    monkeypatch.setattr(engine, "needs_positions", lambda model: False)
    monkeypatch.setattr(engine, "pack_layers", lambda model: None)
    return Letters()
