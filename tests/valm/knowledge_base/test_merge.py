import numpy as np
import pytest

from tests.valm.tiny_clip import make_clip
from valm.errors import ValmError
from valm.knowledge_base import merge as merging
from valm.knowledge_base.build import build
from valm.knowledge_base.dedupe import dedupe
from valm.knowledge_base.merge import merge
from valm.knowledge_base.sources.webdataset import WebdatasetSource
from valm.knowledge_base.store import ImageKnowledgeBase


def test_merge(tars, clip, tokenizer, make_kb, tmp_path):
    first = build(WebdatasetSource(tars), tmp_path / "first", clip, progress=False)
    second = make_kb(9)
    kb = merge([first.path, second.path], tmp_path / "kb", progress=False)
    assert len(kb) == len(first) + len(second)
    assert np.array_equal(kb.vectors(), np.concatenate([first.vectors(), second.vectors()]))
    assert [kb.item(i).id for i in range(len(kb))] == list(range(len(kb)))
    assert kb.item(len(first) + 2).uri == second.item(2).uri
    assert kb.thumbnail(len(first)).size == second.thumbnail(0).size
    assert list(kb.skipped()) == list(first.skipped())
    assert kb.verify(progress=False) == []
    assert ImageKnowledgeBase.open(kb.path).manifest["clip"]["weights_hash"] == clip.weights_hash

    other = build(WebdatasetSource(tars), tmp_path / "other", make_clip(tokenizer, seed=1), progress=False)
    with pytest.raises(ValmError, match="merge only those of one CLIP"):
        merge([first.path, other.path], tmp_path / "never")
    with pytest.raises(ValmError, match="nothing to merge"):
        merge([], tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("copy", [lambda kb, out: merge([kb.path], out, progress=False), dedupe])
def test_damage_gets_no_new_checksum(make_kb, tmp_path, copy):
    kb = make_kb(9)
    file = kb.path / "vectors-00001.npy"
    content = bytearray(file.read_bytes())
    content[-4:] = bytes(4)
    file.write_bytes(content)
    with pytest.raises(ValmError, match=r"vectors-00001\.npy is damaged: it does not match its checksum"):
        copy(kb, tmp_path / "copy")


def test_a_merge_goes_on(make_kb, tmp_path, monkeypatch):
    parts = [make_kb(4).path, make_kb(6).path]
    whole = merge(parts, tmp_path / "whole", progress=False)
    write_shard = merging.write_shard

    def killed(out, number, shard):
        if number == 2:
            raise KeyboardInterrupt
        write_shard(out, number, shard)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(merging, "write_shard", killed)
        merge(parts, tmp_path / "kb", progress=False)
    assert sorted(file.name for file in (tmp_path / "kb").glob("shard-*")) == ["shard-00000.json", "shard-00001.json"]
    assert merge(parts, tmp_path / "kb", progress=False).fingerprint == whole.fingerprint
