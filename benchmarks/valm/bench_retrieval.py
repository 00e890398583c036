"""Context queries of real prose: both kinds, against the published procedure and a GPT-2 of base size.

The text towers have the sizes of CLIP's RN50x16 and ViT-B/32 and random weights; the prose is LAMBADA's, found
through VALM_EVAL_DATA.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.published_context import PublishedContextEncoder
from valm.retrieval.clip import Clip
from valm.retrieval.context import ContextEncoder

TOWERS = {
    "RN50x16": {"embed_dim": 768, "width": 768, "heads": 12, "layers": 12},
    "ViT-B/32": {"embed_dim": 512, "width": 512, "heads": 8, "layers": 12},
}
TOKENS = 512

pytestmark = pytest.mark.skipif("VALM_EVAL_DATA" not in os.environ, reason="needs LAMBADA: set VALM_EVAL_DATA")


@functools.cache
def clip(tower: str) -> Clip:
    torch.manual_seed(0)
    text_cfg = dict(TOWERS[tower])
    vision_cfg = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    return Clip.create({"embed_dim": text_cfg.pop("embed_dim"), "vision_cfg": vision_cfg, "text_cfg": text_cfg})


@functools.cache
def prose(rows: int) -> torch.Tensor:
    """(rows, TOKENS) ids of running text."""
    file = Path(os.environ["VALM_EVAL_DATA"]) / "eval" / "lambada" / "lambada_test.jsonl"
    text = " ".join(json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()[: 20 * rows])
    ids = clip("ViT-B/32").tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: rows * TOKENS]).reshape(rows, TOKENS)


@functools.cache
def gpt2(dtype: torch.dtype) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=49408, bos_token_id=49406, eos_token_id=49407)).eval().to(dtype)


def implementation(name: str, tower: str, dtype: torch.dtype, ids: torch.Tensor):
    """What is timed, and a check of its result."""
    if name == "GPT-2 base forward":
        model = gpt2(dtype)

        def check_logits(logits):
            assert logits.shape == (*ids.shape, 49408)

        return torch.no_grad()(lambda: model(ids, use_cache=False).logits), check_logits

    def check_queries(queries):
        """The first tokens against the same in float64, one prefix at a time."""
        kind = name if name in ("eot", "state") else "state"
        exact = ContextEncoder(clip(tower), query=kind, dtype=torch.float64)
        for length in (1, 4):
            expected = exact(ids[:1, :length])[0, -1]
            assert (queries[0, length - 1] - expected).norm() < 32 * torch.finfo(dtype).eps

    if name == "published":
        wide = clip(tower)
        model = copy.deepcopy(wide.model).to(dtype)
        published = PublishedContextEncoder(Clip(model, wide.tokenizer, wide.model_cfg))
        return lambda: torch.stack([published(row) for row in ids.tolist()]), check_queries
    encoder = ContextEncoder(clip(tower), query=name, dtype=dtype)
    return lambda: encoder(ids), check_queries


@pytest.mark.parametrize("name", ["state", "eot", "published", "GPT-2 base forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tower", "rows"),
    [
        ("RN50x16", 1),
        pytest.param("ViT-B/32", 1, marks=pytest.mark.full),
        pytest.param("RN50x16", 8, marks=pytest.mark.full),
    ],
)
def bench_context(measure, tower, rows, dtype, name):
    function, check = implementation(name, tower, dtype, prose(rows))
    group = f"context queries, {rows} x {TOKENS} tokens, {tower} text tower"
    measure(group=group, name=f"{name} {str(dtype).removeprefix('torch.')}", function=function, check=check, rounds=2)
