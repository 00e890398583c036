"""What every source has in common."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import png, touch
from valm.errors import ValmError
from valm.knowledge_base.format import skipped_of
from valm.knowledge_base.records import Encoding, Record, fingerprint_records
from valm.knowledge_base.sources.dataset import DatasetSource
from valm.knowledge_base.sources.embeddings import EmbeddingSource
from valm.knowledge_base.sources.folder import FolderSource, TableSource
from valm.knowledge_base.sources.webdataset import WebdatasetSource, fingerprint_files
from valm.knowledge_base.sources.zip_file import ZipSource


@pytest.mark.parametrize("kind", ["folder", "zip", "webdataset", "huggingface", "table"])
def test_another_process_may_encode_its_images(kind, tars, clip, tmp_path, monkeypatch):
    """A shard can be pickled, and does not depend on the working directory."""
    (tmp_path / "images").mkdir()
    lines = ["image,caption"]
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "images" / f"{number}.txt").write_text(f"picture {number}")
        lines.append(f"images/{number}.png,picture {number}")
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    source = {
        "folder": lambda: FolderSource("images", shard_size=2),
        "zip": lambda: ZipSource("images.zip", shard_size=2),
        "webdataset": lambda: WebdatasetSource("tars"),
        "huggingface": lambda: DatasetSource([{"image": png(n), "caption": f"picture {n}"} for n in range(3)]),
        "table": lambda: TableSource("table.csv", shard_size=2),
    }[kind]()
    parts = list(source.parts())
    assert pickle.dumps(parts) and len(parts) == source.count
    monkeypatch.chdir("/")
    tables = [part.source(clip, Encoding(thumbnails=0), Mock()) for part in parts]
    encoded = [(item["uri"], item["caption"]) for table in tables for item in table.to_pylist()]
    skipped = {entry["uri"] for table in tables for entry in skipped_of(table)}
    assert [(record.uri, record.caption) for record in source.images() if record.uri not in skipped] == encoded


@pytest.mark.parametrize(
    ("read", "pipe"),
    [
        (lambda folder: WebdatasetSource(folder).parts(), "0.tar"),
        (lambda folder: WebdatasetSource(folder).images(), "0.tar"),
        (lambda folder: EmbeddingSource(folder).parts(), "img_emb/img_emb_0.npy"),
    ],
    ids=["tar", "tar for a CLIP", "embeddings"],
)
def test_a_pipe_is_refused_before_it_is_opened(read, pipe, tmp_path):
    """A command that opens it waits for a writer, and nothing would end the wait."""
    touch(tmp_path / "metadata", "metadata_0.parquet")
    (tmp_path / pipe).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / pipe)
    with pytest.raises(PermissionError, match=rf"not a regular file.*{pipe}"):
        list(read(tmp_path))


def test_names_captions_sizes_of_files_and_contents_count(tmp_path):
    touch(tmp_path, "a", "b")
    (tmp_path / "b").write_bytes(b"1")
    sources = [None, b"", b"1", tmp_path / "b", tmp_path / "a", Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))]
    hashes = [fingerprint_records([Record("x", "", source)]) for source in sources]
    assert len(set(hashes)) == len(sources)
    for same in (b"2", Image.new("RGB", (2, 3), "red"), Image.new("L", (2, 3), 1)):
        assert fingerprint_records([Record("x", "", same)]) not in hashes
    (tmp_path / "b").write_bytes(b"2")  # files are known by their size
    assert hashes[3] == fingerprint_records([Record("x", "", tmp_path / "b")])
    assert hashes[0] == fingerprint_records([Record("x", "", tmp_path / "none")])
    assert hashes[0] != fingerprint_records([Record("x", "y", None)]) != fingerprint_records([Record("y", "x", None)])
    assert fingerprint_files([tmp_path / "a"]) != fingerprint_files([tmp_path / "b"])
    with pytest.raises(FileNotFoundError):
        fingerprint_files([tmp_path / "none"])


def test_a_file_that_cannot_be_looked_at_is_an_error_unless_no_file_can_have_its_name(tmp_path, monkeypatch):
    long = Record("x", "", tmp_path / ("x" * 300))
    assert fingerprint_records([long]) == fingerprint_records([Record("x", "", None)])
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Path, "stat", Mock(side_effect=denied))
    with pytest.raises(ValmError, match=r"cannot read .*/a: Permission denied. Once it can be read"):
        fingerprint_records([Record("x", "", tmp_path / "a")])
