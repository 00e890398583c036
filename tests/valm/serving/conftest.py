"""A tiny VaLM with its retriever, and a stand-in for a model that generates one letter after the other."""

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


@pytest.fixture(scope="session", params=[None, gpt2_like, llama_like])
def served(request, make_served):
    return make_served(request.param)


class Letters:
    """Generates "a", "b", ...: as a tokenizer, a letter is its code. `go` lets so many more tokens be generated."""

    eos_token_id = bos_token_id = 0
    chat_template = None
    added_tokens_decoder: ClassVar = {}
    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=1000))
    generation_config = SimpleNamespace(eos_token_id=0)

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error = None

    def __call__(self, text, **options):
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(id) for id in ids if id)

    def convert_ids_to_tokens(self, id):
        return chr(id)

    def generate(self, ids, max_new_tokens, stopping_criteria, **options):
        self.begun.release()
        for number in range(max_new_tokens):
            assert self.go.acquire(timeout=60)
            if self.error is not None:
                raise self.error
            ids = torch.cat([ids, torch.tensor([[97 + number % 26]])], 1)
            if stopping_criteria(ids, None).all():
                break
        return ids


@pytest.fixture
def letters():
    return Letters()
