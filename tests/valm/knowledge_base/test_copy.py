import errno
import os

import numpy as np
import pytest

from tests.valm.knowledge_base.inputs import build_folder, png, write_embeddings
from tests.valm.tiny_clip import make_clip
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.copy import dedupe, merge
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.embeddings import EmbeddingSource
from valm.knowledge_base.sources.folder import TableSource
from valm.knowledge_base.sources.webdataset import WebdatasetSource


@pytest.fixture
def table(tmp_path):
    """Four images, the third missing, and a row without any."""
    for number in (0, 1, 3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "table.csv").write_text("image,caption\n0.png,one\n1.png,two\n2.png,three\n3.png,four\n,none\n")
    return tmp_path / "table.csv"


@pytest.fixture(params=["links", "copies"])
def how(request, monkeypatch):
    """As on one file system, and as on two."""
    if request.param == "copies":
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EXDEV, "another device")))
    return request.param


def test_a_merge_has_the_files_of_its_parts(tars, table, clip, tmp_path, how):
    """Also where shards have nothing but skipped images, and only one part has thumbnails."""
    parts = [
        build(WebdatasetSource(tars), tmp_path / "first", clip, progress=False),
        build(TableSource(table, shard_size=2), tmp_path / "second", clip, Encoding(thumbnails=0), progress=False),
    ]
    kb = merge([part.path for part in parts], tmp_path / "kb")
    assert [shard["count"] for shard in kb.manifest["shards"]] == [2, 2, 2, 1, 0]
    assert list(kb.skipped()) == [bad for part in parts for bad in part.skipped()] and len(list(kb.skipped())) > 2
    numbered = [shard for part in parts for shard in part.shard_files()]
    for (old, record), (new, joined) in zip(numbered, kb.shard_files(), strict=True):
        assert record == joined and old.read_bytes() == new.read_bytes()
        assert old.samefile(new) == (how == "links")
    assert [kb.thumbnail(id) is None for id in range(len(kb))] == [False] * 4 + [True] * 3
    assert np.array_equal(kb.gather(np.arange(7)), np.concatenate([part.vectors() for part in parts]))
    assert [kb.item(id).id for id in range(7)] == list(range(7)) and kb.item(6).caption == "four"
    assert kb.captioned() == 5 and kb.verify(progress=False) == []
    assert kb.manifest["clip"]["weights_hash"] == clip.weights_hash


def test_what_cannot_be_merged(make_kb, folder, tokenizer, tmp_path):
    other = build_folder(folder, tmp_path / "other", make_clip(tokenizer, seed=1))
    for parts, message in (
        ([make_kb(2).path, other.path], "merge knowledge bases of one CLIP"),
        ([], "nothing to merge"),
    ):
        with pytest.raises(ValmError, match=message):
            merge(parts, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("given_first", [True, False])
def test_embeddings_do_not_hide_how_images_were_encoded(folder, clip, tmp_path, given_first):
    """In a merge, and added to a knowledge base: what is added next is encoded as that was."""
    write_embeddings(tmp_path, 0, np.ones((2, clip.embed_dim), np.float16), url=["a", "b"])
    given = build(EmbeddingSource(tmp_path), tmp_path / "given", clip, progress=False)
    encoded = build_folder(folder, tmp_path / "encoded", clip, batch_size=3, thumbnails=0)
    parts = [given.path, encoded.path] if given_first else [encoded.path, given.path]
    assert merge(parts, tmp_path / "kb").encoding == encoded.encoding
    added = build(EmbeddingSource(tmp_path), tmp_path / "added", clip, after=encoded, progress=False)
    assert added.encoding == encoded.encoding == {"batch_size": 3, "thumbnails": 0} and given.encoding == {}


def test_damage_gets_no_new_checksum(make_kb, tmp_path, how):
    kb = make_kb(9)
    file = kb.path / "shard-00001.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValmError, match=r"shard-00001\.arrow is damaged: it does not match its checksum"):
        dedupe(kb, tmp_path / "once")
    merged = merge([make_kb(4).path, kb.path], tmp_path / "merged")
    assert merged.verify(progress=False) == ["shard-00003.arrow"]
