import errno
import io
import os
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.valm.tiny_clip import make_clip
from valm.errors import ValmError
from valm.knowledge_base import build
from valm.knowledge_base.build import build_from_embeddings, build_from_folder, build_from_webdataset, merge
from valm.knowledge_base.store import ImageKnowledgeBase


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    """Two archives as img2dataset writes them, with a broken picture, a second picture of a sample, odd names."""
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(
        folder / "00000.tar",
        [
            ("000.png", png(0)),
            ("000.txt", b"a red  apple\n"),
            ("000.json", b'{"caption": "a red apple", "url": "x"}'),
            ("001.png", b"broken"),
            ("002.json", b'{"caption": null}'),
            ("002.png", png(2)),
            ("002.mask.png", png(99)),
        ],
    )
    write_tar(
        folder / "00001.tar", [("../../escape.png", png(3)), ("b/004.json", b'{"caption": "4"}'), ("b/004.png", png(4))]
    )
    return folder


def test_webdataset(tars, clip, tmp_path):
    kb = build_from_webdataset(tars, tmp_path / "kb", clip, progress=False)
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
    assert len(build_from_webdataset([tars / "00001.tar"], tmp_path / "one", clip, progress=False)) == 2


def test_progress_shows_rate_and_time_left(tars, clip, tmp_path, capfd):
    build_from_webdataset(tars, tmp_path / "kb", clip)
    last = capfd.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert re.search(r"encode: 100%.* 5\.00/5\.00 \[\d\d:\d\d<\d\d:\d\d, +[\d.k]+ pictures/s, skipped=1\]", last)


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
    kb = build_from_webdataset(tars, tmp_path / "kb", clip, workers=2, progress=False)
    assert [kb.item(n).uri for n in range(len(kb))] == ["0.tar//absolute.png", "0.tar/../up.png", "0.tar/deep.png"]
    assert [entry["uri"] for entry in kb.skipped()] == ["0.tar/bomb.png", "0.tar/deep.json"]
    bomb, deep = (entry["reason"] for entry in kb.skipped())
    assert "pixels" in bomb and "not JSON" in deep
    assert sorted(path for path in tmp_path.rglob("*") if kb.path not in (path, *path.parents)) == before


def test_an_archive_that_is_cut_is_listed(tars, clip, tmp_path):
    whole = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(whole[:1300])
    (tars / "00002.tar").write_bytes(b"this is not an archive")
    kb = build_from_webdataset(tars, tmp_path / "kb", clip, progress=False)
    assert [kb.item(i).uri for i in range(len(kb))] == ["00000.tar/000.png", "00000.tar/002.png"]
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert set(skipped) == {"00000.tar/001.png", "00001.tar/../../escape.png", "00001.tar", "00002.tar"}
    assert skipped["00001.tar"].startswith("the archive ends early")


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
        "zeros for a header": (whole[:second] + bytes(512) + whole[second + 512 :] + end, 1),
        "cut inside a header": (whole[: third + 100], 2),
        "cut between two members": (whole[:third], 2),
        "no end": (whole, 3),
        "pax header of nonsense": (whole + header("x", len(pax), tarfile.XHDTYPE) + padded(pax) + end, 3),
        "sparse header of nonsense": (
            whole + header("x", 20, tarfile.XHDTYPE) + padded(b"20 GNU.sparse.map=x\n") + members[0] + end,
            3,
        ),
        "member of less than nothing": (whole + header("a.png", -1024) + end, 3),
        "member without an end": (whole + header("a.txt", 1 << 80) + end, 3),
        "headers of headers": (whole + 2000 * (header("x", 1, tarfile.GNUTYPE_LONGNAME) + padded(b"x")) + end, 3),
    }


@pytest.mark.parametrize("name", damaged_archives())
def test_damaged_archives_are_listed_and_read_up_to_there(name, clip, tmp_path):
    content, good = damaged_archives()[name]
    (tmp_path / "0.tar").write_bytes(content)
    kb = build_from_webdataset([tmp_path / "0.tar"], tmp_path / "kb", clip, progress=False)
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
    write_tar(tmp_path / "0.tar", [("a.png", png(0)), ("a.txt", b"a" * (2 << 20)), ("thread.png", thread.getvalue())])
    sparse = header("x", len(pax), tarfile.XHDTYPE) + padded(pax) + header("b.txt", 1) + padded(b"b")
    (tmp_path / "0.tar").write_bytes(sparse + (tmp_path / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert tar.next().size == 100 << 30
    kb = build_from_webdataset([tmp_path / "0.tar"], tmp_path / "kb", clip, progress=False)
    assert [kb.item(number).uri for number in range(len(kb))] == ["0.tar/a.png"] and kb.item(0).caption == ""
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
            (b"d.png", png(4)),
            (b"d.json", b"{"),
        ):
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    kb = build_from_webdataset([tmp_path / "0.tar"], tmp_path / "kb", clip, progress=False)
    assert [(kb.item(number).uri, kb.item(number).caption) for number in range(len(kb))] == [
        ("0.tar/a.png", "one\ntwo"),
        ("0.tar/b.png", "half \ufffd of it"),
        ("0.tar/c\ufffd.png", ""),
        ("0.tar/d.png", ""),
    ]
    first, second = kb.skipped()
    assert first == {"uri": "0.tar/a.jpg", "reason": "a.png comes after it in its place"}
    assert second["uri"] == "0.tar/d.json" and "not JSON" in second["reason"]


def test_an_archive_that_cannot_be_read_now_is_an_error(tars, clip, tmp_path, monkeypatch):
    def failing(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with (
        monkeypatch.context() as patched,
        pytest.raises(ValmError, match=r"cannot read .*00000\.tar: .*denied.*; once"),
    ):
        patched.setattr(tarfile, "open", failing)
        build_from_webdataset(tars, tmp_path / "kb", clip, progress=False)
    assert len(build_from_webdataset(tars, tmp_path / "kb", clip, progress=False)) == 4


def test_a_webdataset_build_goes_on(tars, clip, tmp_path, monkeypatch):
    whole = build_from_webdataset(tars, tmp_path / "whole", clip, progress=False)
    read_tar = build._read_tar

    def killed(path):
        if path.name == "00001.tar":
            raise KeyboardInterrupt
        return read_tar(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "_read_tar", killed)
        build_from_webdataset(tars, tmp_path / "kb", clip, progress=False)
    kb = build_from_webdataset(tars, tmp_path / "kb", clip, progress=False)
    assert kb.fingerprint == whole.fingerprint


def test_wrong_webdatasets(clip, tmp_path):
    with pytest.raises(ValmError, match="no tar files in"):
        build_from_webdataset(tmp_path, tmp_path / "kb", clip)
    with pytest.raises(ValmError, match=r"cannot read .*missing\.tar"):
        build_from_webdataset([tmp_path / "missing.tar"], tmp_path / "kb", clip)
    write_tar(tmp_path / "empty.tar", [("a.txt", b"a")])
    with pytest.raises(ValmError, match="the source has no pictures"):
        build_from_webdataset(tmp_path, tmp_path / "kb", clip, progress=False)


def write_embeddings(folder, number, vectors, **columns):
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")


def test_embeddings(clip, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, clip.embed_dim)).astype(np.float16)
    vectors[1], vectors[3, 2] = 0, np.nan
    write_embeddings(
        tmp_path, 10, vectors[:2], url=["http://a", "http://b"], caption=["a", None], original_width=[3, 4]
    )
    write_embeddings(tmp_path, 2, vectors[2:], image_path=["c.jpg", "d.jpg", "e.jpg"])
    kb = build_from_embeddings(tmp_path, tmp_path / "kb", clip, progress=False)
    items = [kb.item(index) for index in range(len(kb))]
    assert [item.uri for item in items] == ["c.jpg", "e.jpg", "http://a"]  # file 2 comes before file 10
    assert (items[2].caption, items[2].width, items[0].caption, items[0].width) == ("a", 3, "", 0)
    expected = vectors[[2, 4, 0]].astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(kb.vectors() - expected).max() <= 2**-11
    assert [entry["uri"] for entry in kb.skipped()] == ["d.jpg", "http://b"]
    assert kb.thumbnail(0) is None


def test_wrong_embeddings(clip, tmp_path):
    with pytest.raises(ValmError, match="no embeddings in"):
        build_from_embeddings(tmp_path, tmp_path / "kb", clip)
    vectors = np.ones((2, clip.embed_dim), np.float16)

    def fails(message, number=0):
        with pytest.raises(ValmError, match=message):
            build_from_embeddings(tmp_path, tmp_path / f"kb-{message[:5]}", clip, progress=False)

    write_embeddings(tmp_path, 0, vectors, url=["a"])
    fails(r"img_emb_0\.npy has 2 vectors, but .*metadata_0\.parquet 1 rows")
    write_embeddings(tmp_path, 0, vectors[:, :3], url=["a", "b"])
    fails(r"holds float16 \(2, 3\), expected floats \(N, 16\) for this CLIP")
    write_embeddings(tmp_path, 0, vectors, url=["a", "b"])
    (tmp_path / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")
    fails(r"cannot read .*img_emb_0\.npy and .*metadata_0\.parquet")
    (tmp_path / "metadata" / "metadata_0.parquet").rename(tmp_path / "metadata" / "metadata.parquet")
    write_embeddings(tmp_path, 0, vectors, url=["a", "b"])
    fails(r"metadata/metadata\.parquet and metadata_0\.parquet both have the number 0; give each")
    (tmp_path / "metadata" / "metadata.parquet").unlink()
    np.save(tmp_path / "img_emb" / "img_emb_00.npy", vectors)
    fails(r"img_emb_0\.npy and img_emb_00\.npy both have the number 0")
    (tmp_path / "img_emb" / "img_emb_00.npy").unlink()
    (tmp_path / "metadata" / "metadata_0.parquet").unlink()
    fails(r"img_emb_0\.npy has no metadata: expected metadata/metadata_0\.parquet")


def test_merge(tars, clip, tokenizer, make_kb, tmp_path):
    first = build_from_webdataset(tars, tmp_path / "first", clip, progress=False)
    second = make_kb(9)
    kb = merge([first.path, second.path], tmp_path / "kb", progress=False)
    assert len(kb) == len(first) + len(second)
    assert np.array_equal(kb.vectors(), np.concatenate([first.vectors(), second.vectors()]))
    assert [kb.item(i).id for i in range(len(kb))] == list(range(len(kb)))
    assert kb.item(len(first) + 2).uri == second.item(2).uri
    assert kb.thumbnail(len(first)).size == second.thumbnail(0).size
    assert list(kb.skipped()) == list(first.skipped())
    assert kb.verify(progress=False) == []
    assert ImageKnowledgeBase.open(kb.path).manifest["clip"]["weights_hash"] == clip.weights_hash

    other = build_from_webdataset(tars, tmp_path / "other", make_clip(tokenizer, seed=1), progress=False)
    with pytest.raises(ValmError, match="merge only those of one CLIP"):
        merge([first.path, other.path], tmp_path / "never")
    with pytest.raises(ValmError, match="nothing to merge"):
        merge([], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_merge_goes_on(make_kb, tmp_path, monkeypatch):
    parts = [make_kb(4).path, make_kb(6).path]
    whole = merge(parts, tmp_path / "whole", progress=False)
    write_piece = build.write_piece

    def killed(out, number, piece):
        if number == 2:
            raise KeyboardInterrupt
        write_piece(out, number, piece)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "write_piece", killed)
        merge(parts, tmp_path / "kb", progress=False)
    assert sorted(file.name for file in (tmp_path / "kb").glob("shard-*")) == ["shard-00000.json", "shard-00001.json"]
    assert merge(parts, tmp_path / "kb", progress=False).fingerprint == whole.fingerprint


@pytest.mark.parametrize("kind", ["struct", "list", "two of one name"])
def test_odd_captions_of_embeddings_are_named(clip, tmp_path, kind):
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.ones((2, clip.embed_dim), np.float32))
    captions = {"struct": [{"a": 1}] * 2, "list": [["a"]] * 2, "two of one name": ["a", "b"]}[kind]
    columns = [pa.array(captions)] * (2 if kind == "two of one name" else 1)
    table = pa.Table.from_arrays(columns, names=["caption"] * len(columns))
    pq.write_table(table, tmp_path / "metadata" / "metadata_0.parquet")
    with pytest.raises(ValmError, match=r"cannot read .*img_emb_0\.npy and .*metadata_0\.parquet: "):
        build_from_embeddings(tmp_path, tmp_path / "kb", clip, progress=False)


def test_pipes_are_refused_before_they_are_opened(clip, tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValmError, match=r"pipe\.tar is a pipe, not a file"):
        build_from_webdataset(tmp_path, tmp_path / "kb", clip, progress=False)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValmError, match=r"pipe\.tar is a pipe, not a file"):
        build_from_folder(tmp_path, tmp_path / "kb", clip, captions=tmp_path / "pipe.tar", progress=False)
