import errno
import pickle

import pytest

from tests.valm.knowledge_base.inputs import build_folder, contents, png
from valm.errors import ValmError
from valm.knowledge_base import encode


def test_bad_pictures_are_listed(kb):
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert set(skipped) == {"p05_cut.png", "p09_text.jpg", "p11_bomb.png"}
    assert kb.manifest["skipped"] == 3
    assert "truncated" in skipped["p05_cut.png"]
    assert "not a picture" in skipped["p09_text.jpg"]
    assert "9000 x 9000 pixels" in skipped["p11_bomb.png"]


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
        build_folder(folder, tmp_path, clip, workers=workers)
    assert (tmp_path / "shard-00000.json").exists()
    build_folder(folder, tmp_path, clip)
    assert contents(tmp_path) == contents(kb.path)


def test_worker_processes_give_the_same_files(kb, folder, clip, tmp_path):
    build_folder(folder, tmp_path, clip, workers=2)
    assert contents(tmp_path) == contents(kb.path)


def test_a_worker_sends_no_picture_back(clip):
    """The bytes of a row went to it once; back come its pixels, thumbnail and place."""
    decoder = encode._Decoder([encode.Record("x", "", png(0) + bytes(1 << 20))], clip, 64)
    assert len(pickle.dumps(decoder[0])) < 100_000


def test_names_and_captions_can_be_written_as_utf8():
    item = encode.Record("caf\udce9.png", "\ud800 red", None)
    assert (item.uri, item.caption) == ("caf\ufffd.png", "\ufffd red")
