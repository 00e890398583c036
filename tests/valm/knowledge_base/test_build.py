import os
import re
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import COUNT, build_folder
from tests.valm.store.manifests import contents
from tests.valm.tiny_clip import make_clip
from valm.errors import ValmError
from valm.knowledge_base import encode
from valm.knowledge_base.build import build, plan_of
from valm.knowledge_base.format import WHAT, image_table
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.dataset import DatasetSource
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.sources.webdataset import WebdatasetSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.shards import Part, sharded_build


def test_opened_again(kb, folder, clip):
    before = contents(kb.path)
    assert len(build_folder(folder, kb.path, clip)) == COUNT  # a finished build is opened, not done again
    opened = ImageKnowledgeBase.open(kb.path)
    assert np.array_equal(opened.vectors(), kb.vectors())
    assert opened.fingerprint == kb.fingerprint
    assert contents(kb.path) == before


@pytest.mark.parametrize("state", ["built", "begun"])
def test_a_picture_of_the_same_size_that_was_written_since_is_named(clip, tmp_path, state):
    """A time in the future says nothing."""
    pictures, out = tmp_path / "pictures", tmp_path / "kb"
    pictures.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "red").save(pictures / f"{name}.bmp")
        os.utime(pictures / f"{name}.bmp", (time.time() + 3600,) * 2)
    if state == "built":
        build(FolderSource(pictures), out, clip, progress=False)
        build(FolderSource(pictures), out, clip, progress=False)
    else:
        with sharded_build(out, WHAT, plan_of(FolderSource(pictures), clip, Encoding())):
            pass
    Image.new("RGB", (32, 32), "green").save(pictures / "a.bmp")
    (written,) = out.glob("manifest.json" if state == "built" else "build.json")
    os.utime(written, (time.time() - 60,) * 2)
    with pytest.warns(UserWarning, match=rf"a\.bmp was written since the knowledge base .*kb was {state}\. If the"):
        build(FolderSource(pictures), out, clip, progress=False)


def test_another_plan_is_refused(kb, folder, clip, tokenizer):
    with pytest.raises(ValmError, match="holds another knowledge base: its shard_size is 6, here it is 5; choose"):
        build_folder(folder, kb.path, clip, shard_size=5)
    with pytest.raises(ValmError, match="holds another knowledge base: its "):
        build_folder(folder, kb.path, make_clip(tokenizer, seed=1))
    with pytest.raises(ValmError, match="is not empty"):
        build_folder(folder, folder, clip)
    with pytest.raises(NotADirectoryError, match=r"p00\.png"):
        build_folder(folder, folder / "p00.png" / "kb", clip)


def test_progress_shows_rate_and_time_left(tars, clip, tmp_path, capfd):
    build(WebdatasetSource(tars), tmp_path / "kb", clip)
    last = capfd.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert re.search(r"encode: 100%.* 5/5 \[\d\d:\d\d<\d\d:\d\d, +[\d.k]+ images/s, skipped=1\]", last)


def given_vectors(number, clip, encoding, progress):
    row = {"uri": f"{number}", "caption": "", "width": 1, "height": 1}
    return image_table([row], np.eye(2, clip.embed_dim)[number : number + 1], [])


def test_a_source_is_a_class_of_its_own(clip, tmp_path):
    """Nothing more than these is asked of it; its settings and hashes stand in the manifest."""
    plan = {"source": "given", "number": 3}
    source = SimpleNamespace(precomputed=True, count=None, plan=lambda: plan, files=lambda: ())
    source.parts = lambda: [Part(f"number {number}", partial(given_vectors, number)) for number in range(2)]
    kb = build(source, tmp_path, clip, progress=False)
    assert np.array_equal(kb.vectors(), np.eye(2, clip.embed_dim))
    assert kb.manifest["plan"] == {**plan, "clip": clip.weights_hash}
    assert [shard["content"] for shard in kb.manifest["shards"]] == ["number 0", "number 1"]


def test_the_plan_has_all_settings_that_the_result_depends_on(folder, clip):
    names = {"source", "clip", "batch_size", "shard_size", "thumbnails"}
    assert plan_of(FolderSource(folder), clip, Encoding()).keys() == names
    assert plan_of(FolderSource(folder), clip, Encoding(workers=3)) == plan_of(FolderSource(folder), clip, Encoding())
    rows = DatasetSource([{"image": None}])
    assert plan_of(rows, clip, Encoding()).keys() == names | {"columns"}


def test_the_workers_of_a_build_end_with_it(folder, clip, tmp_path, monkeypatch):
    """That this works is tested in test_encode.py."""
    (tmp_path / "called").mkdir()
    monkeypatch.setattr(encode, "end_with_parent", lambda worker: (tmp_path / "called" / str(worker)).touch())
    source = FolderSource(folder, shard_size=100)
    build(source, tmp_path / "kb", clip, Encoding(workers=2), progress=False)
    assert sorted(os.listdir(tmp_path / "called")) == ["0", "1"]
