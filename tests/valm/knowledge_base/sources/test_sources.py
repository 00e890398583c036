"""What every source has in common."""

import pickle

import pytest

from tests.valm.knowledge_base.inputs import png
from valm.knowledge_base.encode import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.sources.huggingface import DatasetSource
from valm.knowledge_base.sources.table import TableSource
from valm.knowledge_base.sources.webdataset import WebdatasetSource


class NoProgress:
    def begin(self, units):
        pass

    def advance(self, units, skipped=0):
        pass


@pytest.mark.parametrize("kind", ["folder", "webdataset", "huggingface", "table"])
def test_a_shard_may_be_encoded_by_another_process(kind, tars, clip, tmp_path, monkeypatch):
    """It can be pickled, and does not depend on the working directory."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png(0))
    (tmp_path / "table.csv").write_text("image,caption\nimages/0.png,x\n")
    monkeypatch.chdir(tmp_path)
    source = {
        "folder": lambda: FolderSource("images"),
        "webdataset": lambda: WebdatasetSource("tars"),
        "huggingface": lambda: DatasetSource([{"image": png(0)}]),
        "table": lambda: TableSource("table.csv"),
    }[kind]()
    shards = list(source.shards({}))
    assert pickle.dumps(shards)
    monkeypatch.chdir("/")
    assert len(shards) == source.count
    assert len(shards[0](clip, Encoding(), NoProgress()).items) > 0


@pytest.mark.parametrize("kind", ["folder", "webdataset", "huggingface", "table"])
def test_its_images_are_those_that_are_encoded(kind, tars, clip, tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "images" / f"{number}.txt").write_text(f"picture {number}")
        lines.append(f"images/{number}.png,picture {number}")
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *lines]))
    source = {
        "folder": lambda: FolderSource(tmp_path / "images", shard_size=2),
        "webdataset": lambda: WebdatasetSource(tars),
        "huggingface": lambda: DatasetSource([{"image": png(n), "caption": f"picture {n}"} for n in range(3)]),
        "table": lambda: TableSource(tmp_path / "table.csv", shard_size=2),
    }[kind]()
    shards = [shard(clip, Encoding(thumbnails=0), NoProgress()) for shard in source.shards({})]
    encoded = [(item["uri"], item["caption"]) for shard in shards for item in shard.items.to_pylist()]
    skipped = {entry["uri"] for shard in shards for entry in shard.skipped}
    assert [(record.uri, record.caption) for record in source.images() if record.uri not in skipped] == encoded
