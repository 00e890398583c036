"""Today's code computes what the record holds: floats to 2e-6 of the largest, all else exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.record import cases, retrieval, texts, training


@pytest.fixture(scope="module")
def recorded():
    return load_file(cases.OUTPUTS)


def check(name, found, expected):
    found = found.float() if found.is_floating_point() else found
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    if not expected.is_floating_point():
        assert torch.equal(found, expected), name
        return
    none = expected.isinf()
    assert torch.equal(none, found.isinf()), name
    largest = expected.masked_fill(none, 0).abs().max()
    error = (found.masked_fill(none, 0) - expected.masked_fill(none, 0)).abs().max()
    assert error <= 2e-6 * largest, f"{name}: off by {error / largest:.1e} of the largest"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", cases.MODELS)
def test_models(recorded, name):
    expected = {key: tensor for key, tensor in recorded.items() if key.startswith(f"{name}/")}
    for what, tensor in cases.outputs_of(name):
        check(f"{name}/{what}", tensor, expected.pop(f"{name}/{what}"))
    assert not expected


def test_retrieval(tmp_path):
    expected = load_file(retrieval.OUTPUTS)
    for name, tensor in retrieval.outputs(tmp_path):
        check(name, tensor, expected.pop(name))
    assert not expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trainings(tmp_path):
    """Two hundred steps multiply what two processors round differently: to 1e-3."""
    expected = load_file(training.OUTPUTS)
    for name, losses in training.outputs(tmp_path):
        torch.testing.assert_close(losses.float(), expected.pop(name), rtol=1e-3, atol=1e-3, msg=name)
    assert not expected


def test_texts(tmp_path):
    expected = json.loads(texts.DOCUMENTS.read_text())
    found = dict(texts.outputs(tmp_path))
    assert found.keys() == expected.keys()
    for name, documents in found.items():
        assert documents == expected[name], name
