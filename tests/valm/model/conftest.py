"""A retriever of three images, and a model that was saved with it."""

import pytest

from tests.valm.models import model_for
from tests.valm.three_images import retriever_in
from valm.model.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def retriever(clip, tmp_path_factory):
    return retriever_in(tmp_path_factory.mktemp("stores"), clip)


@pytest.fixture
def seeing(retriever):
    """A VaLM with this retriever."""
    model = model_for(retriever)
    model.set_retriever(retriever)
    return model


@pytest.fixture
def apple(retriever):
    """The ids of a text."""
    return retriever.encoder.tokenizer("a red apple", return_tensors="pt")["input_ids"]


@pytest.fixture
def saved(seeing, apple, tmp_path):
    """A checkpoint folder, ids, and the logits that its model gives with its images."""
    save_checkpoint(seeing, seeing.retriever.encoder.tokenizer, tmp_path / "model")
    return tmp_path / "model", apple, seeing(apple).logits.detach()
