import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.valm.hub_cache import as_in_the_hub_cache
from tests.valm.knowledge_base.inputs import COUNT, build_folder
from tests.valm.store.manifests import edit_manifest
from tests.valm.tiny_clip import make_clip
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base import store
from valm.knowledge_base.build import build
from valm.knowledge_base.copy import merge
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.shards import sealed, shard_file
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_vectors_are_mapped_and_not_copied(kb):
    place = next(ImageKnowledgeBase.open(kb.path).shards()).ctypes.data
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "shard-00000.arrow" in line]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in maps if str(kb.path) in fields[-1]]
    assert any(begin <= place < end for begin, end in ranges)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_mapped_shards_hold_no_file_open(kb):
    """Of thousands, all may be mapped."""
    opened = ImageKnowledgeBase.open(kb.path)
    before = len(os.listdir("/proc/self/fd"))
    kept = list(opened.shards())
    assert len(kept) > 3 and all(one is other for one, other in zip(kept, opened.shards(), strict=True))
    assert len(os.listdir("/proc/self/fd")) == before


def test_thumbnails_have_128_pixels(clip, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (320, 160), "red").save(tmp_path / "pictures" / "wide.png")
    kb = build(FolderSource(tmp_path / "pictures"), tmp_path / "kb", clip, progress=False)
    assert kb.thumbnail(0).size == (128, 64)


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
    with pytest.raises(ValmError, match="which is not a folder there"):
        moved.load_clip()


@pytest.fixture
def copied(kb, tmp_path):
    return shutil.copytree(kb.path, tmp_path, dirs_exist_ok=True)


def test_another_process_gets_the_same_knowledge_base_or_none(kb, copied):
    pickled = pickle.dumps(ImageKnowledgeBase.open(copied))
    assert pickle.loads(pickled).item(1) == kb.item(1)
    edit_manifest(copied, normalized=False)
    with pytest.raises(ValmError, match="has changed since another process opened it"):
        pickle.loads(pickled)


def test_damage_is_found_when_opening(copied):
    def fails(message, folder=copied):
        with pytest.raises(ValmError, match=message):
            ImageKnowledgeBase.open(folder)

    fails(r"no knowledge base at .*nowhere", copied / "nowhere")
    file = copied / "shard-00001.arrow"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    fails(rf"shard-00001\.arrow has {len(content) - 10} bytes instead of {len(content)}")
    file.unlink()
    fails(r"shard-00001\.arrow is missing")
    (copied / "manifest.json").unlink()
    fails(r"is not a knowledge base: it has no manifest\.json")


def test_a_changed_manifest_is_named(copied):
    file = copied / "manifest.json"
    for change in ({"count": 1}, {"sha256": "0" * 64}, {"shards": []}):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(
            ValmError, match=r"manifest\.json is damaged: it differs from its own checksum; make it again"
        ):
            ImageKnowledgeBase.open(copied)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        *(({name: ...}, f"{name}: Field required") for name in ("shards", "dim", "dtype", "skipped")),
        ({"shards": [{}]}, r"shards\[0\]\.content: Field required"),
        ({"shards": 3}, "shards: .* valid array, got 3"),
        ({"clip": {"name": "tiny"}}, "clip.weights_hash: Field required"),
        ({"clip": None}, "clip: .* an object, got None"),
        ({"count": -1}, "count: .* got -1"),
        ({"count": 8}, r"its count is 8, the sum over its shards is \d"),
        ({"skipped": 0}, r"its skipped is 0, the sum over its shards is \d"),
        ({"dim": True}, "dim: .* valid integer, got True"),
        ({"dim": 1 << 40}, "dim: .* got 1099511627776"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(copied, change, found):
    """Whoever wrote its checksum."""
    manifest = json.loads((copied / "manifest.json").read_text()) | change
    manifest = {name: value for name, value in manifest.items() if value is not ... and name != "sha256"}
    (copied / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ValmError, match=rf"manifest\.json is damaged: .*{found}.*; make it again"):
        ImageKnowledgeBase.open(copied)


def test_rows_that_are_not_those_of_the_record_are_named(copied):
    """A shard in the place of another of the same size."""
    first, last = (shard_file(copied, number) for number in (0, -1 + len(list(copied.glob("shard-*")))))
    shards = json.loads((copied / "manifest.json").read_text())["shards"]
    shards[0] |= {"count": shards[-1]["count"]}
    shards[-1] |= {"count": json.loads((copied / "manifest.json").read_text())["shards"][0]["count"]}
    assert shards[0]["count"] != shards[-1]["count"] and first != last
    edit_manifest(copied, shards=shards)
    kb = ImageKnowledgeBase.open(copied)
    for read in (lambda: next(kb.shards()), lambda: kb.item(0)):
        with pytest.raises(ValmError, match=r"shard-00000\.arrow is damaged: it has \d rows, expected \d"):
            read()


@pytest.mark.parametrize("name", ["uri", "caption", "width", "height", "vector"])
def test_a_null_in_a_shard_is_named(copied, name):
    """One in the place of a vector would shift all that come after it."""
    file = shard_file(copied, 0)
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    with_nulls = table.take(pa.array([0, None, *range(2, len(table))]))[name]
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), with_nulls)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table.combine_chunks())
    first, *others = json.loads((copied / "manifest.json").read_text())["shards"]
    edit_manifest(copied, shards=[first | {"bytes": file.stat().st_size}, *others])
    kb = ImageKnowledgeBase.open(copied)
    with pytest.raises(ValmError, match=rf"shard-00000\.arrow is damaged: its {name} contains nulls; make it again"):
        kb.vectors() if name == "vector" else kb.item(0)


def test_a_snapshot_in_the_cache_of_a_hub_opens(kb, tmp_path):
    snapshot = as_in_the_hub_cache(Path(shutil.copytree(kb.path, tmp_path / "kb")), tmp_path / "cache")
    opened = ImageKnowledgeBase.open(snapshot)
    assert np.array_equal(opened.vectors(), kb.vectors()) and opened.verify(progress=False) == []
    assert np.array_equal(merge([snapshot], tmp_path / "merged").vectors(), kb.vectors())


def test_changed_content_is_named_by_verify(copied):
    assert ImageKnowledgeBase.open(copied).verify(progress=False) == []
    for name in ("shard-00001.arrow", "shard-00002.arrow"):
        content = bytearray((copied / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copied / name).write_bytes(content)
    assert ImageKnowledgeBase.open(copied).verify(progress=False) == ["shard-00001.arrow", "shard-00002.arrow"]


def test_overwritten_files_of_the_same_size(copied):
    file = copied / "shard-00000.arrow"
    file.write_bytes(bytes(file.stat().st_size))
    kb = ImageKnowledgeBase.open(copied)
    for read in (lambda: kb.gather(np.array([0])), lambda: kb.item(0)):
        with pytest.raises(ValmError, match=r"shard-00000\.arrow is damaged"):
            read()


@pytest.mark.parametrize("source", ["hf-hub:some/one", "ViT-B-32:laion2b_s34b_b79k", "/", "local-dir:/", "../gone"])
def test_a_manifest_alone_reaches_neither_the_network_nor_folders_elsewhere(copied, clip, monkeypatch, source):
    edit_manifest(copied, clip=ImageKnowledgeBase.open(copied).manifest["clip"] | {"source": source})
    kb = ImageKnowledgeBase.open(copied)
    loaded = []
    monkeypatch.setattr(Clip, "load", lambda source: loaded.append(source) or clip)
    message = r"which is not a folder there: give .*\(--clip\), or .*\(--allow-download\)"
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
    row = next(at for at in range(len(kb)) if len(kb._row(at)[0]) == largest)
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
