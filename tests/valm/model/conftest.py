"""A retriever of three images, and a model that was saved with it."""

import pytest

from tests.valm.models import model_for
from tests.valm.three_images import retriever_in
from valm.model.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def retriever(clip, tmp_path_factory):
    return retriever_in(tmp_path_factory.mktemp("stores"), clip)


@pytest.fixture
def saved(retriever, tmp_path):
    """A checkpoint folder, ids, and the logits that its model gives with its images."""
    model = model_for(retriever)
    model.set_retriever(retriever)
    tokenizer = retriever.encoder.tokenizer
    save_checkpoint(model, tokenizer, tmp_path / "model")
    ids = tokenizer("a red apple", return_tensors="pt")["input_ids"]
    return tmp_path / "model", ids, model(ids).logits.detach()
