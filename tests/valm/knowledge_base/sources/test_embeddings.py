import shutil
from functools import partial

import numpy as np
import pytest

from tests.valm.knowledge_base.inputs import write_embeddings
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.embeddings import EmbeddingSource


def test_embeddings(clip, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, clip.embed_dim)).astype(np.float16)
    vectors[1], vectors[3, 2] = 0, np.nan
    columns = {"url": ["http://a", "http://b"], "caption": ["a", None], "original_width": [3, 4]}
    write_embeddings(tmp_path, 10, vectors[:2], **columns)
    write_embeddings(tmp_path, 2, vectors[2:], image_path=["c.jpg", "d.jpg", "e.jpg"])
    kb = build(EmbeddingSource(tmp_path), tmp_path / "kb", clip, progress=False)
    items = [kb.item(index) for index in range(len(kb))]
    assert [item.uri for item in items] == ["c.jpg", "e.jpg", "http://a"]  # file 2 comes before file 10
    assert (items[2].caption, items[2].width, items[0].caption, items[0].width) == ("a", 3, "", 0)
    expected = vectors[[2, 4, 0]].astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(kb.vectors() - expected).max() <= 2**-11
    assert [entry["uri"] for entry in kb.skipped()] == ["d.jpg", "http://b"]
    assert kb.thumbnail(0) is None


def test_wrong_embeddings(clip, tmp_path):
    vectors, two = np.ones((2, clip.embed_dim), np.float16), {"url": ["a", "b"]}
    of_vectors, of_metadata = tmp_path / "img_emb", tmp_path / "metadata"
    table = of_metadata / "metadata_0.parquet"
    write = partial(write_embeddings, tmp_path, 0)
    unreadable = r"cannot read .*img_emb_0\.npy and .*metadata_0\.parquet"
    for message, change in (
        ("no embeddings in", (of_vectors / "img_emb_0.npy").unlink),
        (r"holds float16 \(2, 16\), expected floats \(1, 16\) for this CLIP", partial(write, vectors, url=["a"])),
        (r"holds float16 \(2, 3\), expected floats \(2, 16\) for this CLIP", partial(write, vectors[:, :3], **two)),
        (unreadable, lambda: table.write_bytes(b"PAR1")),
        (r"not one file of metadata for each \(numbers \[0\] and \[\]\)", table.unlink),
        ("not one file of metadata for each", lambda: shutil.copy(table, of_metadata / "metadata_1.parquet")),
        (
            r"img_emb_0\.npy and other_0\.npy both have the number 0: give each file its own number",
            lambda: shutil.copy(of_vectors / "img_emb_0.npy", of_vectors / "other_0.npy"),
        ),
        (unreadable, partial(write, vectors, caption=[{"a": 1}] * 2)),
        (unreadable, partial(write, vectors, caption=[["a"]] * 2)),
    ):
        shutil.rmtree(tmp_path)
        write(vectors, **two)
        change()
        with pytest.raises(ValmError, match=message):
            build(EmbeddingSource(tmp_path), tmp_path / "kb", clip, progress=False)
