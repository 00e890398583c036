"""Small models with a real knowledge base."""

import pytest

from tests.valm.models import model_of
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever

NUM_IMAGES = 3


@pytest.fixture(scope="session")
def kb(make_kb):
    return make_kb(8)


@pytest.fixture(scope="session")
def make_model(tokenizer, clip, kb):
    """A VaLM whose images matter, with its retriever; num_images=0 is GPT-2*."""

    def make(num_images=NUM_IMAGES, **arguments):
        sizes = {"image_dim": clip.embed_dim, "n_positions": 24}
        model = model_of(tokenizer, num_images=num_images, **sizes | arguments)
        if num_images:
            encoder, blind = ContextEncoder(clip), model.fusion_options.blind
            model.set_retriever(BlindRetriever(encoder) if blind else Retriever(encoder, kb, num_images))
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()
