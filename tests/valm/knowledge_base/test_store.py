import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.valm.killed import exit_code_if_killed, forked, needs_fork, still_running
from tests.valm.tiny_clip import make_clip
from valm.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base import encode
from valm.knowledge_base.build import build_from_folder
from valm.knowledge_base.store import ImageKnowledgeBase

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 small pictures; three more that cannot be read: cut short, not a picture, too large."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (24 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index:02d}.png")
        (folder / f"p{index:02d}.txt").write_text(f"picture number {index}")
    whole = (folder / "p05.png").read_bytes()
    (folder / "p05_cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "p09_text.jpg").write_text("this is no picture")
    Image.new("1", (9000, 9000)).save(folder / "p11_bomb.png")
    return folder


def build(folder, out, clip, **options):
    return build_from_folder(folder, out, clip, **{"shard_size": 6, "batch_size": 4, "progress": False, **options})


@pytest.fixture(scope="module")
def kb(folder, clip, tmp_path_factory):
    return build(folder, tmp_path_factory.mktemp("kb"), clip)


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_vectors_and_items(kb, folder, clip):
    assert (len(kb), kb.dim) == (COUNT, clip.embed_dim)
    assert kb.vectors().shape == (COUNT, clip.embed_dim)
    assert kb.vectors().dtype == np.float16
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
        with pytest.raises(IndexError, match="picture ids go from 0 to 22"):
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


def test_bad_pictures_are_listed(kb):
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert set(skipped) == {"p05_cut.png", "p09_text.jpg", "p11_bomb.png"}
    assert kb.manifest["skipped"] == 3
    assert "truncated" in skipped["p05_cut.png"]
    assert "not a picture" in skipped["p09_text.jpg"]
    assert "9000 x 9000 pixels" in skipped["p11_bomb.png"]


def test_odd_files_are_listed_and_names_written_down(clip, tmp_path):
    """A pipe, a link to nothing, names and captions that are no UTF-8, a caption file cut short."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png", os.fsdecode(b"c\xe9.png")):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "a.json").write_text(r'{"caption": "half \ud83d of it"}')
    (folder / "b.json").write_text('{"caption": "cut')
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    kb = build(folder, tmp_path / "kb", clip, shard_size=100)
    found = [(kb.item(number).uri, kb.item(number).caption) for number in range(len(kb))]
    assert found == [("a.png", "half \ufffd of it"), ("b.png", ""), ("c\ufffd.png", "")]
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert sorted(skipped) == ["b.json", "link.png", "pipe.png"]
    assert "not JSON" in skipped["b.json"] and "no file" in skipped["link.png"] == skipped["pipe.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_drive_is_no_damage(kb, folder, clip, tmp_path, monkeypatch, workers):
    """It stops the build, which goes on to the same bytes once the drive is well again."""

    def failing(self):
        if self.uri == "p08.png":
            raise OSError(errno.EIO, "Input/output error")
        return read(self)

    read = encode.Record.read
    with (
        monkeypatch.context() as patched,
        pytest.raises(ValmError, match=r"cannot read p08\.png: .*output error; once"),
    ):
        patched.setattr(encode.Record, "read", failing)
        build(folder, tmp_path, clip, workers=workers)
    assert (tmp_path / "shard-00000.json").exists()
    build(folder, tmp_path, clip)
    assert contents(tmp_path) == contents(kb.path)


def test_one_shard_is_not_copied(folder, clip, tmp_path):
    kb = build(folder, tmp_path, clip, shard_size=100, thumbnails=0)
    assert not kb.vectors().flags.owndata
    assert kb.thumbnail(0) is None


def test_worker_processes_give_the_same_files(kb, folder, clip, tmp_path):
    build(folder, tmp_path, clip, workers=2)
    assert contents(tmp_path) == contents(kb.path)


def test_opened_again(kb, folder, clip):
    before = contents(kb.path)
    assert len(build(folder, kb.path, clip)) == COUNT  # a finished build is opened, not done again
    opened = ImageKnowledgeBase.open(kb.path)
    assert np.array_equal(opened.vectors(), kb.vectors())
    assert opened.fingerprint == kb.fingerprint
    assert contents(kb.path) == before


@needs_fork
def test_a_killed_build_goes_on_to_the_same_bytes(kb, folder, clip, tmp_path):
    for finished in (0, 1, 2, 5, 9, 3):
        assert exit_code_if_killed(lambda: build(folder, tmp_path, clip), finished) == -signal.SIGKILL
        with pytest.raises(ValmError, match=r"is unfinished; run `valm kb build` again|has no manifest\.json"):
            ImageKnowledgeBase.open(tmp_path)
    assert len(list(tmp_path.glob("shard-*.json"))) > 1
    assert list(tmp_path.glob("*.tmp"))  # of what it was killed in; no other try takes it for its own
    build(folder, tmp_path, clip)
    assert contents(tmp_path) == contents(kb.path)


def test_resuming_does_not_encode_again(folder, clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(encode._Decoder, "__getitem__", stop_at("p12.png", encode._Decoder.__getitem__))
        with pytest.raises(KeyboardInterrupt):
            build(folder, tmp_path, clip)
    read = []
    original = encode._Decoder.__getitem__
    monkeypatch.setattr(
        encode._Decoder, "__getitem__", lambda self, i: read.append(self.records[i].uri) or original(self, i)
    )
    build(folder, tmp_path, clip)
    # sorted, p12.png is the sixteenth: the two shards of six before it were whole
    assert len(read) == COUNT + 3 - 12


def stop_at(uri, original):
    def stopping(self, index):
        if self.records[index].uri == uri:
            raise KeyboardInterrupt
        return original(self, index)

    return stopping


def test_another_plan_is_refused(kb, folder, clip, tokenizer, tmp_path):
    with pytest.raises(
        ValmError, match=r"already holds a knowledge base of another source or other settings \(shard_size differ\)"
    ):
        build(folder, kb.path, clip, shard_size=5)
    with pytest.raises(ValmError, match="already holds a knowledge base"):
        build(folder, kb.path, make_clip(tokenizer, seed=1))
    (tmp_path / "build.json").write_text(json.dumps({"plan": {"source": "other"}}))
    with pytest.raises(ValmError, match="holds an unfinished knowledge base of another source"):
        build(folder, tmp_path, clip)
    with pytest.raises(ValmError, match="is not empty"):
        build(folder, folder, clip)
    with pytest.raises(ValmError, match="cannot make the output folder"):
        build(folder, folder / "p00.png" / "kb", clip)


def test_nothing_readable(clip, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_text("no")
    with pytest.raises(ValmError, match=r"none of the 1 pictures could be read; the first, x\.png: not a picture"):
        build(tmp_path / "pictures", tmp_path / "kb", clip)
    assert contents(tmp_path / "kb") == {}


@needs_fork
def test_what_is_given_up_may_be_killed(clip, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        (tmp_path / "pictures" / f"{name}.png").write_text("no")

    def fail():
        with pytest.raises(ValmError, match="none of the 3 pictures could be read"):
            build(tmp_path / "pictures", tmp_path / "kb", clip, shard_size=1)

    points = 0
    while exit_code_if_killed(fail, points, ((Path, "unlink"),)) == -signal.SIGKILL:
        fail()
        assert contents(tmp_path / "kb") == {}
        points += 1
    assert points == 7  # three records, their files, and the plan


def test_encoder_check(kb, clip, tokenizer):
    kb.check_encoder(clip)
    with pytest.raises(ValmError, match=r"was built with the CLIP tiny \(weights [0-9a-f]{12}\), not with tiny"):
        kb.check_encoder(make_clip(tokenizer, seed=1))


def test_the_clip_is_found_again(kb, folder, clip, tokenizer, tmp_path):
    saved = make_clip(tokenizer)
    with pytest.raises(ValmError, match="does not say where its CLIP is"):
        build(folder, tmp_path / "unsaved", saved).load_clip()
    saved.save(tmp_path / "one" / "clip")
    built = build(folder, tmp_path / "one" / "kb", saved)
    assert built.load_clip().weights_hash == clip.weights_hash
    assert kb.load_clip(tmp_path / "one" / "clip").weights_hash == clip.weights_hash
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = ImageKnowledgeBase.open(tmp_path / "moved" / "kb")
    assert moved.load_clip().weights_hash == clip.weights_hash
    make_clip(tokenizer, seed=1).save(tmp_path / "moved" / "clip")
    with pytest.raises(ValmError, match="was built with the CLIP tiny"):
        moved.load_clip()
    (tmp_path / "moved" / "clip").rename(tmp_path / "elsewhere")
    with pytest.raises(ValmError, match="which is no folder beside it"):
        moved.load_clip()


@pytest.fixture
def copied(kb, tmp_path):
    for name, content in contents(kb.path).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_damage_is_found_when_opening(copied):
    with pytest.raises(ValmError, match=r"no knowledge base at .*nowhere"):
        ImageKnowledgeBase.open(copied / "nowhere")
    edit_manifest(copied, count=7)
    with pytest.raises(ValmError, match="says 7 pictures, but its shards have 23"):
        ImageKnowledgeBase.open(copied)
    edit_manifest(copied, version=99)
    with pytest.raises(ValmError, match="has format version 99, this valm reads 2"):
        ImageKnowledgeBase.open(copied)
    edit_manifest(copied, format="other")
    with pytest.raises(ValmError, match="is not the manifest of a knowledge base"):
        ImageKnowledgeBase.open(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(ValmError, match="is damaged"):
        ImageKnowledgeBase.open(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(ValmError, match=r"is not a knowledge base: it has no manifest\.json"):
        ImageKnowledgeBase.open(copied)


@pytest.mark.parametrize("name", ["shards", "count", "dim", "dtype", "skipped", "clip"])
def test_a_manifest_that_lacks_something_is_damaged(copied, name):
    manifest = json.loads((copied / "manifest.json").read_text())
    for damaged, found in (
        ({key: value for key, value in manifest.items() if key != name}, f"it has no '{name}'"),
        ({**manifest, "shards": [{}]}, r"shards\[0\] has no 'files'"),
        ({**manifest, "shards": 3}, "shards is 3, expected a list"),
        ({**manifest, "clip": {"name": "tiny"}}, "clip has no 'weights_hash'"),
        ({**manifest, "clip": None}, "clip is None, expected an object"),
        ({**manifest, "count": -1}, "count is -1, expected a number from 0 to"),
        ({**manifest, "dim": 10**400}, "dim is a number of more than 60 digits, expected a number from 1"),
        ({**manifest, "dim": True}, "dim is True, expected a whole number"),
    ):
        (copied / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(ValmError, match=rf"manifest\.json is damaged, .*: {found}.*; make it again"):
            ImageKnowledgeBase.open(copied)


def test_cut_and_missing_files_are_named(copied):
    file = copied / "vectors-00001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValmError, match=rf"vectors-00001\.npy has {len(content) - 10} bytes instead of {len(content)}"):
        ImageKnowledgeBase.open(copied)
    file.unlink()
    with pytest.raises(ValmError, match=r"vectors-00001\.npy is missing"):
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


@pytest.mark.skipif("VALM_EVAL_DATA" not in os.environ, reason="needs flickr8k_1000: set VALM_EVAL_DATA")
def test_flickr8k(clip, tmp_path):
    kb = build(Path(os.environ["VALM_EVAL_DATA"]) / "flickr8k_1000", tmp_path, clip, shard_size=400, batch_size=64)
    assert (len(kb), kb.manifest["skipped"]) == (1000, 0)
    assert kb.item(0).uri == "images/1000268201_693b08cb0e.jpg"
    assert len(kb.item(0).caption.splitlines()) == 5
    assert kb.item(0).caption.startswith("A child in a pink dress is climbing up a set of stairs")


@pytest.mark.skipif("VALM_EVAL_DATA" not in os.environ, reason="needs flickr8k_1000: set VALM_EVAL_DATA")
@needs_fork
def test_flickr8k_killed_at_random_and_with_corrupted_pictures(clip, tmp_path):
    folder = tmp_path / "flickr"
    shutil.copytree(Path(os.environ["VALM_EVAL_DATA"]) / "flickr8k_1000", folder)
    random = np.random.default_rng()
    pictures = sorted((folder / "images").iterdir())
    corrupted = [pictures[index] for index in np.sort(random.choice(len(pictures), 3, replace=False))]
    for file, content in zip(corrupted, (b"", b"no picture", corrupted[2].read_bytes()[:2000]), strict=True):
        file.unlink()
        file.write_bytes(content)

    def run(name):
        return build(folder, tmp_path / name, clip, shard_size=50, batch_size=25)

    whole = run("whole")
    assert [entry["uri"] for entry in whole.skipped()] == [f"images/{file.name}" for file in corrupted]
    for there in (0, 4, 9):  # shards before it is killed, and then a moment
        process = forked(lambda: run("killed"))
        while len(list((tmp_path / "killed").glob("shard-*.json"))) <= there:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len(run("killed")) == 997
    assert contents(tmp_path / "killed") == contents(whole.path)


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_a_killed_build_leaves_no_workers(folder, clip, tmp_path, monkeypatch):
    """Killed while its two workers decode."""
    seen = tmp_path / "workers"
    seen.mkdir()
    read = encode.Record.read

    def slowly(self):
        (seen / str(os.getpid())).touch()
        time.sleep(0.2)
        return read(self)

    monkeypatch.setattr(encode.Record, "read", slowly)
    process = forked(lambda: build(folder, tmp_path / "kb", clip, workers=2, shard_size=100))
    while len(list(seen.iterdir())) < 2:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not still_running([int(file.name) for file in seen.iterdir()])


@pytest.mark.parametrize("source", ["hf-hub:some/one", "ViT-B-32:laion2b_s34b_b79k", "/", "local-dir:/", "../gone"])
def test_a_manifest_alone_reaches_neither_the_network_nor_folders_elsewhere(copied, clip, monkeypatch, source):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["clip"]["source"] = source
    (copied / "manifest.json").write_text(json.dumps(manifest))
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
