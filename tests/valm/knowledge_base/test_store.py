import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.valm.knowledge_base.inputs import COUNT, build_folder
from tests.valm.store.manifests import edit_manifest
from tests.valm.tiny_clip import make_clip
from valm.clip.clip import WEIGHTS_FILE, Clip
from valm.errors import ValmError
from valm.knowledge_base import store
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.shards import open_manifest
from valm_kernels import memory_maps


def test_vectors_and_items(kb, folder, clip):
    assert (len(kb), kb.dim) == kb.vectors().shape == (COUNT, clip.embed_dim) and kb.vectors().dtype == np.float16
    expected = clip.encode_images([Image.open(folder / f"p{index:02d}.png") for index in range(COUNT)]).numpy()
    # half of float16's spacing below 1, and float32 noise of another batch size
    assert np.abs(kb.vectors().astype(np.float32) - expected).max() <= 2**-12 + 1e-5
    for index in range(COUNT):
        item = kb.item(index)
        assert (item.id, item.uri) == (index, f"p{index:02d}.png")
        assert (item.caption, item.width, item.height) == (f"picture number {index}", 40, 24 + index)
        assert max(kb.thumbnail(index).size) == min(64, max(40, 24 + index))


def test_vectors_and_scores_across_shards(kb):
    ids = np.array([22, 0, 7, 7, 13, 5, 6])
    assert np.array_equal(kb.gather(ids), kb.vectors()[ids])
    assert kb.gather(np.array([], np.int64)).shape == (0, kb.dim)
    queries, query_ids = torch.eye(3, kb.dim), np.arange(len(ids)) % 3
    assert np.array_equal(kb.scores(queries, query_ids, ids), kb.vectors()[ids, query_ids])
    assert kb.scores(queries, query_ids[:0], ids[:0]).shape == (0,)
    for bad in ([-1], [0, COUNT]):
        with pytest.raises(IndexError, match="image ids go from 0 to 22"):
            kb.gather(np.array(bad))
    for read in (kb.item, kb.thumbnail):
        with pytest.raises(IndexError, match="got 23"):
            read(COUNT)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_mapped_shards_hold_no_file_open(kb):
    """Of thousands, all may be mapped."""
    opened = ImageKnowledgeBase.open(kb.path)
    before = len(os.listdir("/proc/self/fd"))
    kept = list(opened.shards())
    assert len(kept) > 3 and all(one is other for one, other in zip(kept, opened.shards(), strict=True))
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_shard_is_not_copied(folder, clip, tmp_path):
    kb = build_folder(folder, tmp_path, clip, shard_size=100, thumbnails=0)
    assert not kb.vectors().flags.owndata and kb.thumbnail(0) is None


def test_the_clip_is_found_again(kb, folder, clip, tokenizer, tmp_path):
    saved = make_clip(tokenizer)
    with pytest.raises(ValmError, match="does not say where its CLIP is"):
        build_folder(folder, tmp_path / "unsaved", saved).load_clip()
    saved.save(tmp_path / "one" / "clip")
    built = build_folder(folder, tmp_path / "one" / "kb", saved)
    assert built.load_clip().weights_hash == clip.weights_hash
    assert kb.load_clip(tmp_path / "one" / "clip").weights_hash == clip.weights_hash
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = ImageKnowledgeBase.open(tmp_path / "moved" / "kb")
    assert moved.load_clip().weights_hash == clip.weights_hash
    make_clip(tokenizer, seed=1).save(tmp_path / "moved" / "clip")
    with pytest.raises(ValmError, match=r"was built with the CLIP tiny \(weights [0-9a-f]{12}\), not with tiny"):
        moved.load_clip(tmp_path / "moved" / "clip")
    (tmp_path / "moved" / "clip").rename(tmp_path / "elsewhere")
    with pytest.raises(ValmError, match="which is no folder beside it"):
        moved.load_clip()


def test_weights_that_changed_are_not_loaded_unless_the_user_names_them(folder, tokenizer, tmp_path, monkeypatch):
    clip = make_clip(tokenizer)
    clip.save(tmp_path / "clip")
    kb = build_folder(folder, tmp_path / "kb", clip)
    weights = tmp_path / "clip" / WEIGHTS_FILE
    torch.save(clip.model.state_dict(), tmp_path / "clip" / "open_clip_pytorch_model.bin")  # the same weights
    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "create_model", None)  # nothing is loaded
        with pytest.raises(ValmError, match=r"other weights than .* \(open_clip_pytorch_model\.bin\), .*--clip"):
            kb.load_clip()
        weights.rename(weights.with_name("aside"))
        with pytest.raises(ValmError, match=r"other weights than .* \(open_clip_model\.safetensors\)"):
            kb.load_clip()
    assert kb.load_clip(tmp_path / "clip").weights_hash == clip.weights_hash


@pytest.fixture
def copied(kb, tmp_path):
    return shutil.copytree(kb.path, tmp_path, dirs_exist_ok=True)


def test_a_folder_that_has_become_another_is_named(kb, copied):
    """A running process would give the captions and vectors of one knowledge base for images of the other."""
    opened, pickled = ImageKnowledgeBase.open(copied), pickle.dumps(ImageKnowledgeBase.open(copied))
    assert opened.item(0) == kb.item(0) and pickle.loads(pickled).fingerprint == kb.fingerprint
    manifest = (copied / "manifest.json").read_bytes()
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").write_bytes(manifest)  # as a backup restores it, it is the same
    assert opened.vectors().shape == kb.vectors().shape
    edit_manifest(copied, normalized=False)
    assert opened.item(1) == kb.item(1) and opened.fingerprint == kb.fingerprint  # from the same open file
    opened._vectors.cache_clear()
    for read in (lambda: opened.item(len(kb) - 1), opened.vectors):
        with pytest.raises(ValmError, match="has been replaced since it was opened: open it again"):
            read()
    with pytest.raises(ValmError, match="is another one than in the process that handed it on"):
        pickle.loads(pickled)


def test_a_folder_that_is_replaced_while_it_is_opened_is_named(copied, monkeypatch):
    """Its manifest and its vectors would be those of two knowledge bases."""

    def read_and_replace(path, *arguments):
        found = open_manifest(path, *arguments)
        edit_manifest(path, normalized=False)
        os.utime(path / "manifest.json", (1, 1))
        return found

    monkeypatch.setattr(store, "open_manifest", read_and_replace)
    with pytest.raises(ValmError, match="has been replaced since it was opened: open it again"):
        ImageKnowledgeBase.open(copied).vectors()


def test_damage_is_found_when_opening(copied):
    def fails(message, folder=copied):
        with pytest.raises(ValmError, match=message):
            ImageKnowledgeBase.open(folder)

    fails(r"no knowledge base at .*nowhere", copied / "nowhere")
    file = copied / "vectors-00001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    fails(rf"vectors-00001\.npy has {len(content) - 10} bytes instead of {len(content)}")
    file.unlink()
    fails(r"vectors-00001\.npy is missing")
    (copied / "manifest.json").unlink()
    fails(r"is not a knowledge base: it has no manifest\.json")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        *(({name: ...}, f"{name}: Field required") for name in ("shards", "dim", "dtype", "skipped", "sha256")),
        ({"shards": [{}]}, r"shards\[0\]\.files: Field required"),
        ({"shards": 3}, "shards: .* valid list, got 3"),
        ({"clip": {"name": "tiny"}}, "clip.weights_hash: Field required"),
        ({"clip": None}, "clip: .* valid dictionary, got None"),
        ({"count": -1}, "count: .* got -1"),
        ({"dim": True}, "dim: .* valid integer, got True"),
    ],
)
def test_a_damaged_manifest_is_named(copied, change, found):
    manifest = json.loads((copied / "manifest.json").read_text()) | change
    manifest = {name: value for name, value in manifest.items() if value is not ...}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValmError, match=rf"manifest\.json is damaged: .*{found}.*; make it again"):
        ImageKnowledgeBase.open(copied)


def test_changed_content_is_named_by_verify(copied):
    assert ImageKnowledgeBase.open(copied).verify(progress=False) == []
    for name in ("vectors-00001.npy", "items-00002.parquet"):
        content = bytearray((copied / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copied / name).write_bytes(content)
    assert ImageKnowledgeBase.open(copied).verify(progress=False) == ["vectors-00001.npy", "items-00002.parquet"]


def test_overwritten_files_of_the_same_size(copied):
    for name in ("vectors-00000.npy", "items-00000.parquet"):
        (copied / name).write_bytes(bytes((copied / name).stat().st_size))
    kb = ImageKnowledgeBase.open(copied)
    with pytest.raises(ValmError, match=r"vectors-00000\.npy is damaged"):
        kb.gather(np.array([0]))
    with pytest.raises(ValmError, match=r"items-00000\.parquet is damaged"):
        kb.item(0)


@pytest.mark.parametrize("source", ["hf-hub:some/one", "ViT-B-32:laion2b_s34b_b79k", "/", "local-dir:/", "../gone"])
def test_a_manifest_alone_reaches_neither_the_network_nor_folders_elsewhere(copied, clip, monkeypatch, source):
    edit_manifest(copied, clip=ImageKnowledgeBase.open(copied).manifest["clip"] | {"source": source})
    kb = ImageKnowledgeBase.open(copied)
    loaded = []
    monkeypatch.setattr(Clip, "load", lambda source: loaded.append(source) or clip)
    message = r"which is no folder beside it: give .*\(--clip\), or .*\(--allow-download\)"
    with pytest.raises(ValmError, match=message):
        kb.load_clip()
    assert not loaded
    if source in ("/", "local-dir:/"):
        with pytest.raises(ValmError, match=message):
            kb.load_clip(allow_download=True)
    else:
        kb.load_clip(allow_download=True)
        assert loaded == [source]


def test_rows_far_apart_of_vectors_beyond_memory_are_read_alone(kb, monkeypatch):
    asked = []
    monkeypatch.setattr(store, "read_at_random", lambda vectors: asked.append(len(vectors)))
    monkeypatch.setattr(store, "APART", 2 * kb.dim * 2)
    everything = kb.gather(np.arange(len(kb)))
    largest = max(shard["count"] for shard in kb.manifest["shards"])
    row = next(at for at in range(len(kb)) if len(kb._vectors(kb._locate(at)[0])) == largest)
    for limit, maps in ((1 << 40, []), (1, [largest])):
        monkeypatch.setattr(memory_maps, "memory_limit", lambda limit=limit: limit)
        opened = ImageKnowledgeBase.open(kb.path)
        assert np.array_equal(opened.gather(np.arange(len(kb))), everything) and asked == []
        for times in (len(kb), 1):  # a row counts once
            assert np.array_equal(opened.gather(np.full(times, row)), everything[[row] * times]) and asked == maps


@pytest.mark.parametrize(
    ("limit", "value", "ahead"), [("SHARDS", 1, 1), ("SHARDS", 2, 2), ("ROWS", 1, 1), ("", 0, 256)]
)
def test_rows_of_many_shards_are_on_their_way_before_the_first_is_read(kb, monkeypatch, limit, value, ahead):
    asked, ids = [], np.random.default_rng(0).permutation(len(kb)).repeat(2)
    everything = kb.gather(ids)
    monkeypatch.setattr(store, "read_ahead", lambda vectors, rows: asked.append(vectors[rows]))
    monkeypatch.setattr(store, "APART", 0)
    if limit:
        monkeypatch.setattr(store, f"{limit}_AHEAD", value)
    monkeypatch.setattr(memory_maps, "memory_limit", lambda: 1)
    opened = ImageKnowledgeBase.open(kb.path)
    counts = [shard["count"] for shard in kb.manifest["shards"] if shard["count"]]
    for number, (places, vectors, rows) in enumerate(opened._by_shard(ids)):
        assert np.array_equal(vectors[rows], everything[places])
        assert np.array_equal(asked[number], everything[places][::2])  # a row once
        assert len(asked) == min(len(counts), ahead * (number // ahead + 1))
    assert [len(rows) for rows in asked] == counts and len(counts) > 2
    assert np.array_equal(opened.gather(ids), everything)
