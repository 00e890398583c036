from functools import partial

import pytest
import torch

from benchmarks.valm import bench_retrieval, inputs
from valm.model.config import ValmConfig


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tower, a language model and a knowledge base of a few pictures in the place of the large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inputs.TOWERS, "small", {"embed_dim": 16, "width": 32, "heads": 2, "layers": 1})
        patch.setattr(bench_retrieval, "ValmConfig", partial(ValmConfig, n_layer=2, n_embd=32, n_head=2))
        patch.setattr(bench_retrieval, "passages", lambda rows: inputs.token_rows(inputs.prose(), rows, 8))
        vectors = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).numpy()
        kb = inputs.knowledge_base_of([vectors], tmp_path_factory.mktemp("kb") / "kb", inputs.clip("small"))
        yield kb
    bench_retrieval.language_model.cache_clear()


RETRIEVING = [f"{query}{alone}, tower in float32" for query in ("state", "eot") for alone in ("", " alone")]


@pytest.mark.parametrize(
    "name", [pytest.param("GPT-2*", marks=pytest.mark.slow), "pictures given", "self", *RETRIEVING]
)
def test_a_row_of_the_whole_model_holds_its_own_check(small, name):
    timed = []

    def measure(function, check, **row):
        check(function())
        timed.append(row["name"])

    bench_retrieval.bench_whole_model(measure, lambda tower: small, "small", name)
    assert timed == [name if name == "GPT-2*" else f"VaLM, {name}"]
