"""That faiss makes an index from every factory string that is chosen."""

import pytest

from valm.retrieval.index_parameters import choose_factory

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dim", [64, 96, 200, 512, 640, 768, 1000, 1024])
@pytest.mark.parametrize("count", [50_000, 1_000_000, 10_000_000, 200_000_000])
def test_faiss_makes_what_is_chosen(count, dim, device):
    index = faiss.index_factory(dim, choose_factory(count, dim, device), faiss.METRIC_L2)
    assert index.d == dim
