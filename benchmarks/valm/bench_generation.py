"""Generation by VaLM, which retrieves images for every new token, compared with the text-only baseline GPT-2*.

Both models have GPT-2's base size. Further rows time only VaLM's queries. Generation is greedy, with one row and a KV
cache. Weights are random, which changes the tokens but not the time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.sizes import sized
from benchmarks.valm.inputs import INT8, clip, knowledge_base_of, prose, token_rows, valm_model
from benchmarks.valm_kernels import roofline
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm_kernels import FlatIPIndex

TOWER, K = "ViT-B/32", 4
# Tokens of the prompt, and new tokens.
SHORT, LONG, ON_CUDA = sized(((32, 16), (32, 64), (32, 128)), ((8, 2), (8, 3), (8, 2)))
STORED = sized(100_000, 100)


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> ImageKnowledgeBase:
    """STORED random directions."""
    vectors = np.random.default_rng(0).standard_normal((STORED, clip(TOWER).embed_dim), dtype=np.float32)
    return knowledge_base_of([vectors], tmp_path_factory.mktemp("generation") / "kb", clip(TOWER))


@pytest.mark.parametrize(
    "name", ["GPT-2*", "VaLM", "VaLM, tower in bfloat16", pytest.param("VaLM, tower in int8", marks=INT8)]
)
@pytest.mark.parametrize(
    "length", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.full)]
)
def bench_generate(measure, device, kb: ImageKnowledgeBase, length, name):
    if device.type != "cpu" and ("tower in" in name or length == LONG):
        pytest.skip("a tower of its own precision and this length are for CPUs")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    prompt, new = length if device.type == "cpu" else ON_CUDA
    ids = token_rows(prose(), 1, prompt).to(device)
    model = valm_model(kb.dim, 0 if name == "GPT-2*" else K).to(device, dtype)
    if name != "GPT-2*":
        index = FlatIPIndex(kb.vectors(), device=device)
        of_tower = getattr(torch, name.rpartition(" ")[2]) if "tower in" in name else dtype
        encoder = ContextEncoder(clip(TOWER).to(device), dtype=of_tower)
        model.set_retriever(Retriever(encoder, kb, K, index, cache_tokens=0))

    def check(tokens: torch.Tensor) -> None:
        assert tokens.shape == (1, prompt + new) and torch.equal(tokens[:, :prompt], ids)

    measure(
        group=f"generation of {new} tokens after {prompt}, GPT-2 base size, {STORED // 1000}k images, K {K}",
        name=name,
        function=lambda: model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False),
        check=check,
        # the weights once for each token
        arithmetic=new * roofline.transformer_s(model.num_parameters(), 1, passes=1),
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=INT8)])
def bench_queries(measure, device, dtype):
    if device.type != "cpu":
        pytest.skip("a tower of its own precision is for CPUs")
    prompt, new = LONG
    ids = token_rows(prose(), 1, prompt + new)
    encoder = ContextEncoder(clip(TOWER), dtype=getattr(torch, dtype))

    def read() -> torch.Tensor:
        cache = encoder.new_cache(1)
        first = encoder.step(ids[:, :prompt], cache)
        return torch.cat([first, *(encoder.step(one, cache) for one in ids[:, prompt:].split(1, 1))], 1)

    def check(queries: torch.Tensor) -> None:
        same = torch.nn.functional.cosine_similarity(queries[:, 1:], encoder(ids)[:, 1:], dim=-1)
        assert same.min() > 0.9

    measure(
        group=f"queries of a prompt of {prompt} tokens and of {new} more, one by one, {TOWER}'s size",
        name=dtype,
        function=read,
        check=check,
    )
