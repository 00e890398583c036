import pytest

from tests.valm.retrieval.tiny_clip import TEXTS, make_clip
from valm.retrieval.clip import Clip
from valm.tokenizer import clip_tokenizer, prune_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return prune_tokenizer(clip_tokenizer(), TEXTS)


@pytest.fixture(scope="session")
def clip(tokenizer) -> Clip:
    return make_clip(tokenizer)
