"""A knowledge base of given vectors, with an index, for the tests of both."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from valm.knowledge_base.format import (
    ITEM_SCHEMA,
    EncodedShard,
    begin_knowledge_base,
    clip_entry,
    finish_knowledge_base,
    write_shard,
)
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.index_tuning import build_index

COUNT, K = 3000, 4
make_index = partial(build_index, k=K, progress=False)


def slow(*values):
    """A case of a `parametrize` that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def random_directions(count, dim, seed, centres=40):
    """Unit vectors around some centres, as pictures of like things are."""
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(centres, dim))
    rows = middle[generator.integers(0, centres, count)] + 0.7 * generator.normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def queries(kb, count=400, seed=1) -> torch.Tensor:
    return torch.from_numpy(random_directions(count, kb.dim, seed)).float()


def make_kb_of_directions(clip, out, caption="", copies=1) -> ImageKnowledgeBase:
    """COUNT vectors in three shards, each `copies` times, far from each other."""
    build = begin_knowledge_base(out, {})
    vectors = np.tile(random_directions(COUNT // copies, clip.embed_dim, seed=0), (copies, 1))
    for number, part in enumerate(np.split(vectors, 3)):
        items = [{"uri": f"{number}/{row}", "caption": caption, "width": 1, "height": 1} for row in range(len(part))]
        write_shard(build.out, number, EncodedShard(part, pa.Table.from_pylist(items, ITEM_SCHEMA), None, []))
    finish_knowledge_base(build, clip_entry(clip, build.out), clip.embed_dim)
    return ImageKnowledgeBase.open(out)


def make_indexed(clip, out, **arguments) -> ImageKnowledgeBase:
    kb = make_kb_of_directions(clip, out)
    make_index(kb, queries(kb), **arguments)
    return kb
