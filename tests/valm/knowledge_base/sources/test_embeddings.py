import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.valm.knowledge_base.inputs import write_embeddings
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.embeddings import EmbeddingSource


def test_embeddings(clip, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, clip.embed_dim)).astype(np.float16)
    vectors[1], vectors[3, 2] = 0, np.nan
    write_embeddings(
        tmp_path, 10, vectors[:2], url=["http://a", "http://b"], caption=["a", None], original_width=[3, 4]
    )
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
    with pytest.raises(ValmError, match="no embeddings in"):
        build(EmbeddingSource(tmp_path), tmp_path / "kb", clip)
    vectors = np.ones((2, clip.embed_dim), np.float16)

    def fails(message, number=0):
        with pytest.raises(ValmError, match=message):
            build(EmbeddingSource(tmp_path), tmp_path / f"kb-{message[:5]}", clip, progress=False)

    write_embeddings(tmp_path, 0, vectors, url=["a"])
    fails(r"img_emb_0\.npy has 2 vectors, but .*metadata_0\.parquet 1 rows")
    write_embeddings(tmp_path, 0, vectors[:, :3], url=["a", "b"])
    fails(r"holds float16 \(2, 3\), expected floats \(N, 16\) for this CLIP")
    write_embeddings(tmp_path, 0, vectors, url=["a", "b"])
    (tmp_path / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")
    fails(r"cannot read .*img_emb_0\.npy and .*metadata_0\.parquet")
    (tmp_path / "metadata" / "metadata_0.parquet").rename(tmp_path / "metadata" / "metadata.parquet")
    write_embeddings(tmp_path, 0, vectors, url=["a", "b"])
    fails(r"metadata/metadata\.parquet and metadata_0\.parquet both have the number 0; give each")
    (tmp_path / "metadata" / "metadata.parquet").unlink()
    np.save(tmp_path / "img_emb" / "img_emb_00.npy", vectors)
    fails(r"img_emb_0\.npy and img_emb_00\.npy both have the number 0")
    (tmp_path / "img_emb" / "img_emb_00.npy").unlink()
    (tmp_path / "metadata" / "metadata_0.parquet").unlink()
    fails(r"img_emb_0\.npy has no metadata: expected metadata/metadata_0\.parquet")
    write_embeddings(tmp_path, 0, vectors, url=["a", "b"])
    write_embeddings(tmp_path, 1, vectors, url=["a", "b"])
    (tmp_path / "img_emb" / "img_emb_1.npy").unlink()
    fails(r"metadata_1\.parquet has no embeddings: expected img_emb/img_emb_1\.npy")


@pytest.mark.parametrize("kind", ["struct", "list", "two of one name"])
def test_odd_captions_of_embeddings_are_named(clip, tmp_path, kind):
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.ones((2, clip.embed_dim), np.float32))
    captions = {"struct": [{"a": 1}] * 2, "list": [["a"]] * 2, "two of one name": ["a", "b"]}[kind]
    columns = [pa.array(captions)] * (2 if kind == "two of one name" else 1)
    table = pa.Table.from_arrays(columns, names=["caption"] * len(columns))
    pq.write_table(table, tmp_path / "metadata" / "metadata_0.parquet")
    with pytest.raises(ValmError, match=r"cannot read .*img_emb_0\.npy and .*metadata_0\.parquet: "):
        build(EmbeddingSource(tmp_path), tmp_path / "kb", clip, progress=False)
