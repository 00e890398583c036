import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.valm.killed import exit_code_if_killed, forked, needs_fork
from tests.valm.knowledge_base.inputs import COUNT, build_folder, contents
from tests.valm.tiny_clip import make_clip
from valm.errors import ValmError
from valm.knowledge_base import encode
from valm.knowledge_base.build import build, plan_of
from valm.knowledge_base.format import ITEM_SCHEMA, EncodedShard, begin_knowledge_base
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.dataset import DatasetSource
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.sources.webdataset import WebdatasetSource
from valm.knowledge_base.store import ImageKnowledgeBase


def test_opened_again(kb, folder, clip):
    before = contents(kb.path)
    assert len(build_folder(folder, kb.path, clip)) == COUNT  # a finished build is opened, not done again
    opened = ImageKnowledgeBase.open(kb.path)
    assert np.array_equal(opened.vectors(), kb.vectors())
    assert opened.fingerprint == kb.fingerprint
    assert contents(kb.path) == before


def test_a_picture_of_the_same_size_that_was_written_anew_is_named(clip, tmp_path):
    """Of a finished knowledge base, and of one that was begun; a time in the future says nothing."""
    for name, color in (("a", "red"), ("b", "blue")):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), color).save(tmp_path / "pictures" / f"{name}.bmp")
    for file in (tmp_path / "pictures").iterdir():
        os.utime(file, (time.time() + 3600,) * 2)
    build(FolderSource(tmp_path / "pictures"), tmp_path / "kb", clip, progress=False)
    build(FolderSource(tmp_path / "pictures"), tmp_path / "kb", clip, progress=False)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "pictures" / "a.bmp")
    os.utime(tmp_path / "kb" / "manifest.json", (time.time() - 60,) * 2)
    with pytest.warns(UserWarning, match=r"a\.bmp has been written since the knowledge base .*kb was built\. If its"):
        build(FolderSource(tmp_path / "pictures"), tmp_path / "kb", clip, progress=False)
    begun = tmp_path / "begun"
    plan = plan_of(FolderSource(tmp_path / "pictures"), clip, Encoding())
    begin_knowledge_base(begun, plan)
    os.utime(begun / "build.json", (time.time() - 60,) * 2)
    with pytest.warns(UserWarning, match=r"a\.bmp has been written since the knowledge base .*begun was begun"):
        build(FolderSource(tmp_path / "pictures"), begun, clip, progress=False)


@pytest.mark.slow
@needs_fork
def test_a_killed_build_goes_on_to_the_same_bytes(kb, folder, clip, tmp_path):
    for finished in (0, 1, 2, 5, 9, 3):
        assert exit_code_if_killed(lambda: build_folder(folder, tmp_path, clip), finished) == -signal.SIGKILL
        with pytest.raises(ValmError, match=r"is unfinished; run `valm kb build` again|has no manifest\.json"):
            ImageKnowledgeBase.open(tmp_path)
    assert len(list(tmp_path.glob("shard-*.json"))) > 1
    assert list(tmp_path.glob("*.tmp"))  # of what it was killed in; no other try takes it for its own
    build_folder(folder, tmp_path, clip)
    assert contents(tmp_path) == contents(kb.path)


def test_resuming_does_not_encode_again(folder, clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(encode._Decoder, "__getitem__", stop_at("p12.png", encode._Decoder.__getitem__))
        with pytest.raises(KeyboardInterrupt):
            build_folder(folder, tmp_path, clip)
    read = []
    original = encode._Decoder.__getitem__
    monkeypatch.setattr(
        encode._Decoder, "__getitem__", lambda self, i: read.append(self.records[i].uri) or original(self, i)
    )
    build_folder(folder, tmp_path, clip)
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
        ValmError, match=r"holds another knowledge base: its shard_size is \d+, here it is \d+; choose another folder"
    ):
        build_folder(folder, kb.path, clip, shard_size=5)
    with pytest.raises(ValmError, match="holds another knowledge base: its "):
        build_folder(folder, kb.path, make_clip(tokenizer, seed=1))
    (tmp_path / "build.json").write_text(json.dumps({"plan": {"source": "other"}}))
    with pytest.raises(ValmError, match="holds another unfinished knowledge base: its "):
        build_folder(folder, tmp_path, clip)
    with pytest.raises(ValmError, match="is not empty"):
        build_folder(folder, folder, clip)
    with pytest.raises(NotADirectoryError, match=r"p00\.png"):
        build_folder(folder, folder / "p00.png" / "kb", clip)


def test_progress_shows_rate_and_time_left(tars, clip, tmp_path, capfd):
    build(WebdatasetSource(tars), tmp_path / "kb", clip)
    last = capfd.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert re.search(r"encode: 100%.* 5/5 \[\d\d:\d\d<\d\d:\d\d, +[\d.k]+ images/s, skipped=1\]", last)


@pytest.mark.slow
@pytest.mark.skipif("VALM_EVAL_DATA" not in os.environ, reason="needs flickr8k_1000: set VALM_EVAL_DATA")
def test_flickr8k(clip, tmp_path):
    kb = build_folder(
        Path(os.environ["VALM_EVAL_DATA"]) / "flickr8k_1000", tmp_path, clip, shard_size=400, batch_size=64
    )
    assert (len(kb), kb.manifest["skipped"]) == (1000, 0)
    assert kb.item(0).uri == "images/1000268201_693b08cb0e.jpg"
    assert len(kb.item(0).caption.splitlines()) == 5
    assert kb.item(0).caption.startswith("A child in a pink dress is climbing up a set of stairs")


@pytest.mark.slow
@pytest.mark.skipif("VALM_EVAL_DATA" not in os.environ, reason="needs flickr8k_1000: set VALM_EVAL_DATA")
@needs_fork
def test_flickr8k_killed_at_random_and_with_corrupted_pictures(clip, tmp_path):
    folder = tmp_path / "flickr"
    shutil.copytree(Path(os.environ["VALM_EVAL_DATA"]) / "flickr8k_1000", folder)
    random = np.random.default_rng(0)
    pictures = sorted((folder / "images").iterdir())
    corrupted = [pictures[index] for index in np.sort(random.choice(len(pictures), 3, replace=False))]
    for file, content in zip(corrupted, (b"", b"no picture", corrupted[2].read_bytes()[:2000]), strict=True):
        file.unlink()
        file.write_bytes(content)

    def run(name):
        return build_folder(folder, tmp_path / name, clip, shard_size=50, batch_size=25)

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


class GivenVectors:
    """The smallest source: two shards of one vector each."""

    precomputed = True
    count = None

    def plan(self):
        return {"source": "given", "fingerprint": "", "number": 3}

    def files(self):
        return ()

    def shards(self, done):
        return [partial(given_vectors, number) for number in range(2)]


def given_vectors(number, clip, encoding, progress):
    items = pa.Table.from_pylist([{"uri": f"{number}", "caption": "", "width": 1, "height": 1}], ITEM_SCHEMA)
    return EncodedShard(np.eye(2, clip.embed_dim)[number : number + 1], items, None, [], facts={"number": number})


def test_a_source_is_a_class_of_its_own(clip, tmp_path):
    """Nothing but plan, count, files and shards is asked of it; its settings and facts stand in the manifest."""
    kb = build(GivenVectors(), tmp_path, clip, progress=False)
    assert np.array_equal(kb.vectors(), np.eye(2, clip.embed_dim))
    assert kb.manifest["plan"] == {"source": "given", "fingerprint": "", "number": 3, "clip": clip.weights_hash}
    assert [shard["number"] for shard in kb.manifest["shards"]] == [0, 1]


def test_the_plan_has_all_settings_that_the_result_depends_on(folder, clip):
    names = {"source", "fingerprint", "clip", "batch_size", "shard_size", "thumbnails"}
    assert plan_of(FolderSource(folder), clip, Encoding()).keys() == names
    assert plan_of(FolderSource(folder), clip, Encoding(workers=3)) == plan_of(FolderSource(folder), clip, Encoding())
    rows = DatasetSource([{"image": None}])
    assert plan_of(rows, clip, Encoding()).keys() == names | {"columns"}


def test_the_workers_of_a_build_end_with_it(folder, clip, tmp_path, monkeypatch):
    """That this works is tested in test_processes.py."""
    (tmp_path / "called").mkdir()
    monkeypatch.setattr(encode, "end_with_parent", lambda worker: (tmp_path / "called" / str(worker)).touch())
    source = FolderSource(folder, shard_size=100)
    build(source, tmp_path / "kb", clip, Encoding(workers=2), progress=False)
    assert sorted(os.listdir(tmp_path / "called")) == ["0", "1"]
