"""A knowledge base of given vectors with an index, for the tests of both."""

from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from valm.knowledge_base.format import WHAT, clip_entry, facts_of, finish_knowledge_base, image_table, vectors_of
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.index_tuning import build_index
from valm.store.shards import Part, run_here, sharded_build

COUNT, K = 3000, 4
make_index = partial(build_index, k=K, progress=False)


def slow(*values):
    """A slow case of a `parametrize`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def random_directions(count, dim, seed, centres=40):
    """Unit vectors around some centres, like pictures of similar objects."""
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(centres, dim))
    rows = middle[generator.integers(0, centres, count)] + 0.7 * generator.normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def queries(kb, count=400, seed=1) -> torch.Tensor:
    return torch.from_numpy(random_directions(count, kb.dim, seed)).float()


def make_kb_of_directions(clip, out, caption="", copies=1) -> ImageKnowledgeBase:
    """COUNT vectors in three shards, far from each other, each `copies` times."""
    vectors = np.tile(random_directions(COUNT // copies, clip.embed_dim, seed=0), (copies, 1))

    def table_of(part, progress):
        rows = [{"uri": str(row), "caption": caption, "width": 1, "height": 1} for row in range(len(part))]
        table = image_table(rows, part, [])
        return table, facts_of(table)

    with sharded_build(out, WHAT, {}) as build:
        build.write(table_of, [Part("", part) for part in np.split(vectors, 3)], run_here, Mock())
        finish_knowledge_base(build, clip_entry(clip, build.out), clip.embed_dim)
    return ImageKnowledgeBase.open(out)


def make_indexed(clip, out, **arguments) -> ImageKnowledgeBase:
    kb = make_kb_of_directions(clip, out)
    make_index(kb, queries(kb), **arguments)
    return kb


def spoil(kb, shard, rows):
    """Replaces some neighbouring vectors of a shard by NaN."""
    file, vectors = kb.shard_files()[shard][0], vectors_of(kb.table(shard))[rows]
    file.write_bytes(file.read_bytes().replace(vectors.tobytes(), np.full_like(vectors, np.nan).tobytes()))
