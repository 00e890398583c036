import errno
import io
import os
import tarfile
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import png, write_tar
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.webdataset import WebdatasetSource


def test_webdataset(tars, clip, tmp_path):
    kb = build(WebdatasetSource(tars), tmp_path / "kb", clip, progress=False)
    assert [(kb.item(i).uri, kb.item(i).caption) for i in range(len(kb))] == [
        ("00000.tar/000.png", "a red apple"),
        ("00000.tar/002.png", ""),
        ("00001.tar/../../escape.png", ""),
        ("00001.tar/b/004.png", "4"),
    ]
    assert [entry["uri"] for entry in kb.skipped()] == ["00000.tar/001.png"]
    expected = clip.encode_images([Image.open(io.BytesIO(png(seed))) for seed in (0, 2, 3, 4)]).numpy()
    assert np.abs(kb.vectors() - expected).max() <= 2**-12 + 1e-5
    assert kb.thumbnail(3).size == (30, 20)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kb", "tars"]  # nothing was unpacked
    assert len(build(WebdatasetSource([tars / "00001.tar"]), tmp_path / "one", clip, progress=False)) == 2


def test_archives_lead_nowhere_else(clip, tmp_path):
    """Links, names that climb out, brackets without end, and a bomb: nothing outside is read or written."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(5))
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    deep = b"[" * 200_000
    members = [("/absolute.png", png(0)), ("../up.png", png(1)), ("deep.png", png(2)), ("deep.json", deep)]
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "0.tar", [*members, ("bomb.png", bomb.getvalue())])
    with tarfile.open(tars / "1.tar", "w") as tar:
        for name, type in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, str(secret)
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    kb = build(WebdatasetSource(tars), tmp_path / "kb", clip, progress=False)
    assert [kb.item(n).uri for n in range(len(kb))] == ["0.tar//absolute.png", "0.tar/../up.png", "0.tar/deep.png"]
    reasons = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert list(reasons) == ["0.tar/bomb.png", "0.tar/deep.json", "1.tar/soft.png", "1.tar/hard.png"]
    assert "pixels" in reasons["0.tar/bomb.png"] and "not JSON" in reasons["0.tar/deep.json"]
    assert "a link" in reasons["1.tar/soft.png"] == reasons["1.tar/hard.png"]
    assert sorted(path for path in tmp_path.rglob("*") if kb.path not in (path, *path.parents)) == before


def test_images_that_are_not_read_are_listed(clip, tmp_path):
    names = ["a.png", "a.mask.png", "photo.v2.png", "2024.05.01.png", "h.heic", "note.md", "x/._a.png"]
    write_tar(tmp_path / "0.tar", [(name, png(0)) for name in names])
    kb = build(WebdatasetSource(tmp_path), tmp_path / "kb", clip, progress=False)
    assert [kb.item(n).uri for n in range(len(kb))] == ["0.tar/a.png"]
    reasons = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert sorted(reasons) == ["0.tar/2024.05.01.png", "0.tar/h.heic", "0.tar/photo.v2.png"]
    assert "convert it to JPEG" in reasons["0.tar/h.heic"] and "first dot" in reasons["0.tar/photo.v2.png"]


def header(name, size, type=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, type
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content):
    return content + bytes(-len(content) % 512)


def damaged_archives():
    """What became of an archive of three pictures -> how many of them come before the damage."""
    members = [header(f"{seed}.png", len(png(seed))) + padded(png(seed)) for seed in range(3)]
    whole, end = b"".join(members), bytes(1024)
    second, third = len(members[0]), len(members[0] + members[1])
    flipped = bytearray(whole + end)
    flipped[second] ^= 1
    pax = b"30 mtime=what is not a number\n"
    return {
        "flipped bit in a header": (bytes(flipped), 1),
        "cut inside a header": (whole[: third + 100], 2),
        "cut inside a caption": (whole + header("a.txt", 1000) + b"a red", 3),
        "no end": (whole, 3),
        "member of less than nothing": (whole + header("a.png", -1024) + end, 3),
        "pax header of nonsense": (whole + header("x", len(pax), tarfile.XHDTYPE) + padded(pax) + end, 3),
        "headers of headers": (whole + 2000 * (header("x", 1, tarfile.GNUTYPE_LONGNAME) + padded(b"x")) + end, 3),
    }


@pytest.mark.parametrize("name", damaged_archives())
def test_damaged_archives_are_listed_and_read_up_to_there(name, clip, tmp_path):
    content, good = damaged_archives()[name]
    (tmp_path / "0.tar").write_bytes(content)
    kb = build(WebdatasetSource([tmp_path / "0.tar"]), tmp_path / "kb", clip, progress=False)
    assert [kb.item(number).uri for number in range(len(kb))] == [f"0.tar/{number}.png" for number in range(good)]
    assert [(entry["uri"], entry["reason"][:23]) for entry in kb.skipped()] == [("0.tar", "the archive ends early:")]


def test_bombs_in_archives(clip, tmp_path):
    """A sparse member of 100 GB, a caption of 2 MB, a thread of pixels."""
    thread = io.BytesIO()
    Image.new("1", (65_000, 1)).save(thread, "PNG")
    pax = b"".join(
        f"{len(line) + 4} {line}\n".encode()
        for line in ("GNU.sparse.size=107374182400", "GNU.sparse.map=0,1", "GNU.sparse.numblocks=1")
    )
    members = [("a.png", png(0)), ("a.txt", b"a" * (2 << 20)), ("b.png", png(1)), ("thread.png", thread.getvalue())]
    write_tar(tmp_path / "0.tar", members)
    sparse = header("x", len(pax), tarfile.XHDTYPE) + padded(pax) + header("b.txt", 1) + padded(b"b")
    (tmp_path / "0.tar").write_bytes(sparse + (tmp_path / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert tar.next().size == 100 << 30
    kb = build(WebdatasetSource([tmp_path / "0.tar"]), tmp_path / "kb", clip, progress=False)
    assert [(kb.item(n).uri, kb.item(n).caption) for n in range(len(kb))] == [("0.tar/a.png", ""), ("0.tar/b.png", "")]
    skipped = {entry["uri"].removeprefix("0.tar/"): entry["reason"] for entry in kb.skipped()}
    assert sorted(skipped) == ["a.txt", "b.txt", "thread.png"]
    assert "more than 1,048,576 bytes" in skipped["a.txt"] and "sparse" in skipped["b.txt"]


def test_captions_and_doubles_in_archives(clip, tmp_path):
    """The rules of a folder, whatever comes first; names and captions that are no UTF-8."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (
            (b"a.jpg", png(0)),
            (b"a.txt", b"one \n\ntwo"),
            (b"a.json", b'{"caption": "three"}'),
            (b"a.png", png(1)),
            (b"b.txt", b" \n"),
            (b"b.json", rb'{"caption": "half \ud83d of it"}'),
            (b"b.png", png(2)),
            (b"c\xe9.png", png(3)),
            (b"d.json", b"{"),
            (b"d.png", png(4)),
        ):
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    kb = build(WebdatasetSource([tmp_path / "0.tar"]), tmp_path / "kb", clip, progress=False)
    assert [(kb.item(number).uri, kb.item(number).caption) for number in range(len(kb))] == [
        ("0.tar/a.jpg", "one\ntwo"),
        ("0.tar/a.png", "one\ntwo"),
        ("0.tar/b.png", "half \ufffd of it"),
        ("0.tar/c\ufffd.png", ""),
        ("0.tar/d.png", ""),
    ]
    (skipped,) = kb.skipped()
    assert skipped["uri"] == "0.tar/d.json" and "not JSON" in skipped["reason"]


def test_an_archive_that_cannot_be_read_now_is_an_error(tars, clip, tmp_path, monkeypatch):
    denied = PermissionError(errno.EACCES, "Permission denied")
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", Mock(side_effect=denied))
        with pytest.raises(ValmError, match=r"cannot read .*00000\.tar: .*denied.*\. Once"):
            build(WebdatasetSource(tars), tmp_path / "kb", clip, progress=False)
    assert len(build(WebdatasetSource(tars), tmp_path / "kb", clip, progress=False)) == 4


def test_wrong_webdatasets(clip, tmp_path):
    with pytest.raises(ValmError, match="no tar files in"):
        build(WebdatasetSource(tmp_path), tmp_path / "kb", clip)
    with pytest.raises(FileNotFoundError, match=r"missing\.tar"):
        build(WebdatasetSource([tmp_path / "missing.tar"]), tmp_path / "kb", clip)
    write_tar(tmp_path / "empty.tar", [("a.txt", b"a")])
    with pytest.raises(ValmError, match="the source has no images"):
        build(WebdatasetSource(tmp_path), tmp_path / "kb", clip, progress=False)
