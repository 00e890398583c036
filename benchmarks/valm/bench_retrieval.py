"""Context queries of real prose, search among a million pictures, and the whole VaLM, compared with GPT-2 base.

The text encoders have the sizes of CLIP's RN50x16 and ViT-B/32 and random weights. The prose is the language reference
that comes with Python. `--full` with VALM_EVAL_DATA adds searches among a million pictures, on LAMBADA, with an index
tuned on AG News. If the pictures' vectors are missing, they are made in the folder `--scratch` (2.6 GB).

The whole models make logits of 200 MB, whose page faults would differ from row to row with what ran before. Let malloc
keep freed memory, as the `valm` command does: MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from benchmarks.peers.published_context import PublishedContextEncoder
from benchmarks.sizes import sized
from benchmarks.valm.inputs import (
    INT8,
    TOWERS,
    clip,
    evaluation_texts,
    gpt2,
    large_knowledge_base,
    prose,
    token_rows,
    valm_model,
)
from benchmarks.valm_kernels import roofline
from valm.clip.clip import Clip
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import CPU_CALL_TOKENS, QUERIES, ContextEncoder
from valm.retrieval.faiss_index import FaissIndex, open_index
from valm.retrieval.index_parameters import choose_factory, index_parameters
from valm.retrieval.index_tuning import build_index, context_queries, recall
from valm.retrieval.retriever import Retrieved, Retriever
from valm_kernels import ip_topk, merge_topk

TOKENS = sized(512, 96)
K = 4
TARGET_RECALL = 0.95

# The first benchmark that needs the million pictures makes them and their index: six minutes on two cores.
pytestmark = pytest.mark.timeout(3600)

language_model = functools.cache(valm_model)


@functools.cache
def text(rows: int) -> torch.Tensor:
    """(rows, TOKENS) ids of running text."""
    return token_rows(prose(), rows, TOKENS)


@functools.cache
def passages(rows: int) -> torch.Tensor:
    """(rows, TOKENS) ids of LAMBADA, for measurements with the million pictures."""
    return token_rows(evaluation_texts("lambada"), rows, TOKENS)


def implementation(name: str, tower: str, dtype: torch.dtype, ids: torch.Tensor):
    """The timed function, on the device of the ids, and a check of its result."""
    if name == "GPT-2 base forward":
        model = gpt2(dtype).to(ids.device)

        def check_logits(logits):
            assert logits.shape == (*ids.shape, 49408)

        return torch.no_grad()(lambda: model(ids, use_cache=False).logits), check_logits

    def check_queries(queries):
        """Compares early tokens with float64, one prefix at a time. The first token has no query of ours."""
        kind = name if name in ("eot", "state") else "state"
        exact = ContextEncoder(clip(tower).to(ids.device), query=kind, dtype=torch.float64)
        for length in (2, 4):
            expected = exact(ids[:1, :length])[0, -1]
            bound = 0.1 if dtype == torch.int8 else 32 * torch.finfo(dtype).eps
            assert (queries[0, length - 1] - expected).norm() < bound

    if name == "published":
        wide = clip(tower)
        model = copy.deepcopy(wide.model).to(ids.device, dtype)
        published = PublishedContextEncoder(Clip(model, wide.tokenizer, wide.model_cfg))
        return lambda: torch.stack([published(row) for row in ids.tolist()]), check_queries
    encoder = ContextEncoder(clip(tower).to(ids.device), query=name, dtype=dtype)
    return lambda: encoder(ids), check_queries


def arithmetic(name: str, tower: str, tokens: int) -> float | None:
    """The least seconds on an H100 (roofline.py): each token once, and for "eot" one EOT per token."""
    if name == "published":  # encodes tokens more than once
        return None
    if name == "GPT-2 base forward":
        return roofline.transformer_s(gpt2(torch.float32).num_parameters(), tokens, passes=1)
    weights = 12 * TOWERS[tower]["layers"] * TOWERS[tower]["width"] ** 2
    return roofline.transformer_s(weights, (2 if name == "eot" else 1) * tokens, passes=1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=INT8 if dtype == torch.int8 else ()
        )
        for name in ("state", "eot", "published", "GPT-2 base forward")
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
        if dtype != torch.int8 or name in QUERIES
    ],
)
@pytest.mark.parametrize("tower", ["RN50x16", pytest.param("ViT-B/32", marks=pytest.mark.full)])
def bench_context(measure, device, tower, dtype, name):
    rows = 8 if device.type == "cuda" else 1
    function, check = implementation(name, tower, dtype, text(rows).to(device))
    measure(
        group=f"context queries, {rows} x {TOKENS} tokens, {tower} text tower",
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        function=function,
        check=check,
        arithmetic=arithmetic(name, tower, rows * TOKENS),
    )


@pytest.fixture(scope="session")
def indexed(pytestconfig: pytest.Config):
    """Makes the knowledge base of a tower, and its index, once."""

    @functools.cache
    def make(tower: str) -> ImageKnowledgeBase:
        pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
        kb = large_knowledge_base(pytestconfig.getoption("--scratch"), tower)
        if index_parameters(kb) is None:
            texts = evaluation_texts("ag_news")
            kinds = [context_queries(ContextEncoder(clip(tower), query=query), texts) for query in ("eot", "state")]
            queries = torch.cat([kind.chunk(2)[half] for half in (0, 1) for kind in kinds])
            factory = choose_factory(len(kb), kb.dim) or "IVF4,Flat"  # at the tiny size
            build_index(kb, queries, factory, k=K, target_recall=TARGET_RECALL, asked="queries of AG News, both kinds")
        return kb

    return make


@functools.cache
def nearest(kb: ImageKnowledgeBase, query: str, tower: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Context queries (TOKENS, E) of prose, and the ids (TOKENS, K) that exact search finds."""
    queries = ContextEncoder(clip(tower), query=query)(passages(1))[0]
    found, offsets = [], [0]
    for vectors in kb.shards():
        found.append(ip_topk(queries, vectors, K))
        offsets.append(offsets[-1] + len(vectors))
    return queries, merge_topk(found, offsets[:-1], K).indices


@pytest.mark.full
def bench_open(measure, indexed):
    kb = indexed("RN50x16")

    def check(opened):
        assert len(opened) == len(opened.kb) == len(kb)

    measure(
        group="open a knowledge base of 1M x 768 and its index",
        name="ImageKnowledgeBase.open, open_index",
        function=lambda: open_index(ImageKnowledgeBase.open(kb.path)),
        check=check,
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["eot", "state", "GPT-2 base forward"])
def bench_search(measure, indexed, name):
    group = f"search for {TOKENS} tokens among 1M x 768, k {K}"
    if name == "GPT-2 base forward":
        function, check = implementation(name, "RN50x16", torch.float32, passages(1))
        measure(group=group, name=f"{name} float32", function=function, check=check)
        return
    kb = indexed("RN50x16")
    queries, truth = nearest(kb, name, "RN50x16")
    index = FaissIndex.open(kb)
    reached = recall(index.search(queries, K).indices, truth)

    def check(found):
        assert reached > TARGET_RECALL - 0.05, f"recall {reached:.3f}"

    note = f"{index.parameters.factory} {index.parameters.search}; recall@{K} {reached:.3f}, "
    note += f"{index.parameters.recall:.3f} when built"
    measure(
        group=group,
        name=f"valm index, {name} queries",
        function=lambda: index.search(queries, K),
        check=check,
        note=note,
    )


class ProductsAndSearch:
    """A retriever whose text encoder consists of linear layers only: a lower bound of retrieval, whatever attention,
    normalisation and Python save."""

    def __init__(self, retriever: Retriever, ids: torch.Tensor):
        encoder = retriever.encoder
        self.k, self.dim, self.index = retriever.k, retriever.dim, retriever.index
        self.found, self.queries = retriever(ids), encoder(ids)
        self.layers = encoder.tower.linear
        runs = encoder.runs(ids)
        streams = [sum(len(run.ids) for run in runs)]
        if encoder.query == "eot":
            streams.append(sum(len(run.wanted) for run in runs))
        self.calls = torch.randn(sum(streams), encoder.tower.positions.shape[1]).split(CPU_CALL_TOKENS)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Retrieved:
        for rows in self.calls:
            for block in self.layers:
                for layer in (block.attention_in, block.attention_out, block.mlp_in):
                    out = layer(rows)
                block.mlp_out(out)
        self.index.search(self.queries.flatten(0, 1), self.k)
        return self.found


RETRIEVING = [
    pytest.param(f"{query}, {what} in {dtype}", marks=INT8 if dtype == "int8" else ())
    for what, dtypes in (("tower", ("float32", "bfloat16", "int8")), ("products and search", ("int8",)))
    for dtype in dtypes
    for query in ("state", "eot")
]


@pytest.mark.full
@pytest.mark.parametrize("name", ["GPT-2*", "pictures given", *RETRIEVING])
@pytest.mark.parametrize("tower", TOWERS)
def bench_whole_model(measure, indexed, tower, name):
    """Encode + retrieve + model in float32, with the frozen text encoder in each precision: the processor decides which
    is faster. "given": with pictures found before."""
    ids = passages(2)
    kb = indexed(tower)
    model = language_model(kb.dim, 0 if name == "GPT-2*" else K)
    pictures: dict[str, torch.Tensor] = {}
    retriever = None
    if name != "GPT-2*":
        dtype = torch.float32 if name == "pictures given" else getattr(torch, name.rpartition(" ")[2])
        encoder = ContextEncoder(clip(tower), query="eot" if name.startswith("eot") else "state", dtype=dtype)
        retriever = Retriever(encoder, kb, K, cache_tokens=0)
    if name == "pictures given":
        found = retriever(ids)
        retriever, pictures = None, {"image_pool": found.image_pool, "image_index": found.image_index}
    if "products" in name:
        retriever = ProductsAndSearch(retriever, ids)
    model.set_retriever(retriever)

    def check(logits):
        assert logits.shape == (*ids.shape, 49408) and logits.isfinite().all()

    measure(
        group=f"whole model, {len(ids)} x {TOKENS} tokens, {tower} text tower, 1M pictures, k {K}",
        name=name if name == "GPT-2*" else f"VaLM, {name}",
        function=torch.no_grad()(lambda: model(ids, **pictures).logits),
        check=check,
    )
