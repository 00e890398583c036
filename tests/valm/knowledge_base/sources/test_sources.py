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
