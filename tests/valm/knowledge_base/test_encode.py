import errno
import io
import multiprocessing
import sys
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.valm.killed import forked, is_running, still_running
from tests.valm.knowledge_base.inputs import build_folder
from tests.valm.store.manifests import contents
from valm.errors import ValmError
from valm.knowledge_base import encode
from valm.knowledge_base.encode import end_with_parent


def test_bad_pictures_are_listed(kb):
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert set(skipped) == {"p05_cut.png", "p09_text.jpg", "p11_bomb.png"}
    assert kb.manifest["skipped"] == 3
    assert "truncated" in skipped["p05_cut.png"]
    assert "not a picture" in skipped["p09_text.jpg"]
    assert "9000 x 9000 pixels" in skipped["p11_bomb.png"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_of_the_drive_is_no_damage(kb, folder, clip, tmp_path, monkeypatch, workers):
    """It stops the build, which goes on to the same bytes once the drive is well again."""

    def failing(self):
        if self.uri == "p08.png":
            raise OSError(errno.EIO, "Input/output error")
        return read(self)

    read = encode.Record.read
    with monkeypatch.context() as patched:
        patched.setattr(encode.Record, "read", failing)
        with pytest.raises(ValmError, match=r"cannot read p08\.png: .*output error\. Once"):
            build_folder(folder, tmp_path, clip, workers=workers)
    assert (tmp_path / "shard-00000.json").exists()
    build_folder(folder, tmp_path, clip)
    assert contents(tmp_path) == contents(kb.path)


@pytest.mark.slow
def test_worker_processes_give_the_same_files(kb, folder, clip, tmp_path):
    build_folder(folder, tmp_path, clip, workers=2)
    assert contents(tmp_path) == contents(kb.path)


def test_names_and_captions_can_be_written_as_utf8():
    item = encode.Record("caf\udce9.png", "\ud800 red", None)
    assert (item.uri, item.caption) == ("caf\ufffd.png", "\ufffd red")


def load(pids):
    """A DataLoader whose workers have more to say than their pipes hold, and whose main process reads one batch."""

    def as_bytes(batch):  # through a pipe; tensors go through shared memory
        return batch[0].numpy().tobytes()

    data = [torch.zeros(100_000) for _ in range(64)]
    batches = iter(DataLoader(data, 1, collate_fn=as_bytes, num_workers=2, worker_init_fn=end_with_parent))
    next(batches)
    pids.send([worker.pid for worker in batches._workers])
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_their_parent():
    found, pids = multiprocessing.Pipe(duplex=False)
    main = forked(lambda: load(pids))
    assert found.poll(60)
    workers = found.recv()
    assert len(workers) == 2 and all(map(is_running, workers))
    main.kill()
    main.join()
    assert not still_running(workers)


def test_a_thumbnail_has_no_comment_of_its_image():
    commented = io.BytesIO()
    Image.new("RGB", (96, 80), "green").save(commented, "JPEG", comment=b"taken at home")
    assert Image.open(commented).info["comment"] == b"taken at home"
    assert "comment" not in Image.open(io.BytesIO(encode.thumbnail_bytes(Image.open(commented), 64))).info
