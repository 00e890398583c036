"""Shared inputs of the benchmarks of `valm`: models of real sizes, real prose, a large knowledge base.

All weights are random, because speed does not depend on them. The timed text is the language reference that comes with
Python. Searches among a million pictures need LAMBADA, AG News and DBPedia, found through VALM_EVAL_DATA.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.sizes import sized
from valm.clip.clip import Clip
from valm.evaluation.sets import SETS, find_file, read_set
from valm.knowledge_base.format import WHAT, clip_entry, facts_of, finish_knowledge_base, image_table
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.store.shards import Part, Progress, ProgressBar, run_here, sharded_build
from valm_kernels.int8_rows import has_avx2

TOWERS = {
    name: dict(zip(("embed_dim", "width", "heads", "layers"), sized(real, (16, 32, 2, 1)), strict=True))
    for name, real in {
        "RN50x16": (768, 768, 12, 12),
        "ViT-B/32": (512, 512, 8, 12),
        "half of ViT-B/32": (256, 256, 4, 12),
    }.items()
}
IDS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
GPT2_BASE = sized({}, {"n_layer": 2, "n_embd": 32, "n_head": 2})
PICTURES = sized(1_000_000, 400)
INT8 = pytest.mark.skipif(not has_avx2(), reason="int8 needs AVX2")
# Context queries of each kind, from which the large knowledge base's vectors are made.
REAL_VECTORS = sized(32_768, 512)
PERTURBATION = 0.25
SHARD = sized(125_000, 200)


@functools.cache
def clip(tower: str) -> Clip:
    torch.manual_seed(0)
    text_cfg = dict(TOWERS[tower])
    vision_cfg = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    return Clip.create({"embed_dim": text_cfg.pop("embed_dim"), "vision_cfg": vision_cfg, "text_cfg": text_cfg})


@functools.cache
def gpt2(dtype: torch.dtype) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**IDS, **GPT2_BASE)).eval().to(dtype)


def valm_model(image_dim: int, num_images: int, **options: Any) -> VaLMForCausalLM:
    """VaLM of GPT-2's base size, or without images the text-only baseline GPT-2*."""
    torch.manual_seed(0)
    config = ValmConfig(n_positions=512, image_dim=image_dim, num_images=num_images, **IDS, **GPT2_BASE, **options)
    return VaLMForCausalLM(config).eval()


def smollm2(**options: Any) -> LlamaForCausalLM:
    """A decoder of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    width, inner, layers, heads, kv_heads = sized((576, 1536, 30, 9, 3), (32, 64, 2, 2, 1))
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = LlamaConfig(**({"vocab_size": 49152} | sizes | options), tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def prose() -> list[str]:
    """Running text that every machine has: the language reference that comes with Python."""
    from pydoc_data.topics import topics

    return [" ".join(topic.split()) for topic in topics.values()]


def evaluation_texts(name: str) -> list[str]:
    """The texts of an evaluation set. If the set is not on this machine, the benchmark is skipped."""
    if sized(False, True):
        return prose()
    if find_file(name) is None:
        pytest.skip(f"needs {SETS[name].title}: set VALM_EVAL_DATA to the folder of the evaluation sets")
    return [item if isinstance(item, str) else item.text for item in read_set(SETS[name])]


def token_rows(texts: Iterable[str], rows: int, length: int) -> torch.Tensor:
    """(rows, length) ids of running text."""
    tokenizer, ids = clip("ViT-B/32").tokenizer, []
    for text in texts:
        if len(ids) >= rows * length:
            break
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def real_vectors(tower: str, count: int = 2 * REAL_VECTORS) -> np.ndarray:
    """Context queries of DBPedia's descriptions (count, E) float32, half of each kind. They stand for pictures:
    an aligned CLIP embeds pictures near the texts that describe them."""
    ids = token_rows(evaluation_texts("dbpedia"), count // 512, 512)
    queries = [
        ContextEncoder(clip(tower), query=query)(part).flatten(0, 1)
        for query, part in zip(("eot", "state"), ids.chunk(2), strict=True)
    ]
    return torch.cat(queries).numpy()


def large_knowledge_base(folder: Path, tower: str) -> ImageKnowledgeBase:
    """A knowledge base of PICTURES perturbed `real_vectors` in `folder`, made if it is missing."""
    out = folder / f"{PICTURES}-{tower.replace('/', '-')}"
    if (out / "manifest.json").exists():
        return ImageKnowledgeBase.open(out)
    real = real_vectors(tower)

    def shards() -> Iterator[np.ndarray]:
        for number in range(PICTURES // SHARD):
            yield perturbed(real, SHARD, number)

    plan = {"real": len(real), "perturbation": PERTURBATION, "count": PICTURES}
    return knowledge_base_of(shards(), out, clip(tower), plan)


def perturbed(real: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` vectors (count, E): each is a row of `real` (N, E) plus PERTURBATION times the difference of two others.
    So they differ in the directions and by the lengths in which real vectors differ."""
    one, other, another = np.random.default_rng(seed).integers(0, len(real), (3, count))
    return real[one] + PERTURBATION * (real[other] - real[another])


def knowledge_base_of(
    shards: Iterable[np.ndarray], out: Path, clip: Clip, plan: dict[str, float] | None = None
) -> ImageKnowledgeBase:
    """A knowledge base of the unit vectors of `shards`, (n, E) each, without pictures. `plan`: what they depend on."""

    def table_of(shard: np.ndarray, progress: Progress) -> tuple[Any, dict[str, int]]:
        rows = [{"uri": str(row), "caption": "", "width": 1, "height": 1} for row in range(len(shard))]
        table = image_table(rows, shard / np.linalg.norm(shard, axis=1, keepdims=True), [])
        return table, facts_of(table)

    with sharded_build(out, WHAT, plan or {}) as build, ProgressBar("make", " vectors", None, False) as bar:
        build.write(table_of, (Part("", shard) for shard in shards), run_here, bar)
        finish_knowledge_base(build, clip_entry(clip, build.out), clip.embed_dim)
    return ImageKnowledgeBase.open(out)
