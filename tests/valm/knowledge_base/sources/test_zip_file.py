import io
import os
import struct
import zipfile

import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import png
from valm.errors import ValmError
from valm.knowledge_base import records
from valm.knowledge_base.build import build
from valm.knowledge_base.images import ImageSource
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.sources.zip_file import ZipSource


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def captions_of(source):
    return {record.uri: record.caption for record in source.images() if record.source is not None}


PHOTOS = [
    ("photos/b.png", png(0)),
    ("photos/a.png", png(1)),
    ("photos/a.txt", "a red apple"),
    ("photos/deep/c.JPG", b"no picture"),
    ("photos/captions.csv", "image,caption\nb.png,a boat\ndeep/c.JPG,a cat\n"),
]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_file_is_read_as_its_folder(clip, tmp_path, compression):
    file = write_zip(tmp_path / "photos.zip", PHOTOS, compression)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    packed, unpacked = ZipSource(file), FolderSource(tmp_path / "photos")
    assert (
        captions_of(packed)
        == captions_of(unpacked)
        == {"a.png": "a red apple", "b.png": "a boat", "deep/c.JPG": "a cat"}
    )
    assert packed.remarks == unpacked.remarks == []
    encoding = Encoding(workers=1)
    kbs = [
        build(source, tmp_path / name, clip, encoding, progress=False)
        for name, source in (("1", packed), ("2", unpacked))
    ]
    first, second = ([[kb.item(n) for n in range(len(kb))], list(kb.skipped())] for kb in kbs)
    assert first == second and [len(found) for found in first] == [2, 1]
    assert kbs[0].manifest["plan"]["source"] == "zip"


def test_zip_files_of_other_systems(tmp_path):
    """What macOS adds, backslashes of Windows, and a table that is not in the file."""
    members = [
        ("photos/", b""),
        ("photos/a.png", png(0)),
        ("__MACOSX/photos/._a.png", b"x"),
        ("photos/.DS_Store", b"x"),
    ]
    assert captions_of(ZipSource(write_zip(tmp_path / "mac.zip", members))) == {"a.png": ""}
    table = tmp_path / "table.csv"
    table.write_text("image,caption\nsea/b.png,the sea\n")
    file = write_zip(
        tmp_path / "windows.ZIP", [("all\\sea\\b.png", png(1)), ("all\\a.png", png(0)), ("all\\Thumbs.db", b"x")]
    )
    source = ImageSource(file, captions=table).open()
    assert captions_of(source) == {"a.png": "", "sea/b.png": "the sea"}
    assert source.remarks == ["files ignored: 1 .db", "1 of 2 images have no caption"]
    assert source.images()[1].read().size == (30, 20)


def test_zip_files_lead_nowhere_else_and_bombs_are_bounded(clip, tmp_path, monkeypatch):
    """Nothing is unpacked, and no more is decompressed than an image or a caption may have."""
    monkeypatch.setattr(records, "MAX_MEMBER_BYTES", 1 << 20)
    pixels = io.BytesIO()
    Image.new("1", (20000, 20000)).save(pixels, "PNG")
    bombs = [
        ("bomb.png", bytes(2 << 20)),
        ("pixels.png", pixels.getvalue()),
        ("a.txt", bytes(2 << 20)),
        ("a.png", png(0)),
    ]
    file = write_zip(tmp_path / "0.zip", [*bombs, ("../../up.png", png(1)), ("/absolute.png", png(2))])
    before = sorted(tmp_path.parent.rglob("*"))
    kb = build(ZipSource(file), tmp_path / "kb", clip, progress=False)
    assert [kb.item(n).uri for n in range(len(kb))] == ["/absolute.png", "a.png"] and kb.item(1).caption == ""
    reasons = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert list(reasons) == ["bomb.png", "pixels.png", "a.txt"]
    assert reasons["a.txt"] == reasons["bomb.png"] == "a file of more than 1,048,576 bytes is not read"
    assert sorted(path for path in tmp_path.parent.rglob("*") if kb.path not in (path, *path.parents)) == before


def test_damaged_members_are_listed(clip, tmp_path):
    content = write_zip(tmp_path / "0.zip", [("a.png", png(0)), ("b.png", png(1))], zipfile.ZIP_STORED).read_bytes()
    place = content.index(png(1)) + 100
    (tmp_path / "0.zip").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    kb = build(ZipSource(tmp_path / "0.zip"), tmp_path / "kb", clip, progress=False)
    (skipped,) = kb.skipped()
    assert (
        len(kb) == 1 and "Bad CRC-32 for file 'b.png'. Copy or download the zip file again, or un" in skipped["reason"]
    )


def encrypted(content):
    """Sets the bit of encryption in the headers of a zip file."""
    content = bytearray(content)
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        struct.pack_into("<H", content, content.index(signature) + flags, 1)
    return bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[:-30],
            r"cannot read the zip file .*0\.zip: File is not a zip file\. Copy or download",
        ),
        (lambda content: b"<html>", r"cannot read the zip file .*0\.zip: File is not a zip file\. Copy or download"),
        (encrypted, r"none of the 1 images could be read; the first, a\.png: .*encrypted.* or unpack it and name the"),
    ],
    ids=["cut", "a page", "encrypted"],
)
def test_wrong_zip_files_are_one_sentence(clip, tmp_path, change, message):
    file = write_zip(tmp_path / "0.zip", [("a.png", png(0))])
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValmError, match=message):
        build(ZipSource(file), tmp_path / "kb", clip, progress=False)


def test_other_wrong_zip_files(tmp_path):
    with pytest.raises(ValmError, match=r"no images in .*0\.zip: looked for .*; HEIC is not read"):
        ZipSource(write_zip(tmp_path / "0.zip", [("a.heic", b"x"), ("a.txt", "x")]))
    with pytest.raises(ValmError, match=r"the caption table .*1\.zip/captions\.json is not an object"):
        ZipSource(write_zip(tmp_path / "1.zip", [("a.png", b"x"), ("captions.json", "[]")]))
    os.mkfifo(tmp_path / "2.zip")
    with pytest.raises(PermissionError, match="not a regular file"):
        ZipSource(tmp_path / "2.zip")


def test_a_zip_file_that_was_written_again_is_opened_again(tmp_path):
    for number in range(2):
        (record,) = ZipSource(write_zip(tmp_path / f"{number}.zip", [("a.png", png(number))])).images()
        os.replace(tmp_path / f"{number}.zip", tmp_path / "a.zip")
        os.utime(tmp_path / "a.zip", (number, number))
        (record,) = ZipSource(tmp_path / "a.zip").images()
        assert record.read().tobytes() == Image.open(io.BytesIO(png(number))).tobytes()
