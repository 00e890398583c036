import errno
import json
import os
import unicodedata
from unittest.mock import Mock

import pytest

from tests.valm.knowledge_base.inputs import touch
from valm.errors import ValmError
from valm.knowledge_base import captions
from valm.knowledge_base.captions import parse_caption, read_table
from valm.knowledge_base.sources.folder import FolderSource


def captions_of(folder, table=None):
    """The captions of the images in `folder` that have some, and why others cannot be read."""
    records = FolderSource(folder, captions=table).images()
    of_image = {record.uri: record.caption for record in records if record.caption}
    return of_image, {record.uri: record.reason for record in records if record.source is None}


def test_captions_beside_the_picture(tmp_path):
    touch(tmp_path, "a.png", "b/c.png", "d.png", "e.png", "UPPER.JPG")
    (tmp_path / "a.txt").write_text("a red\tapple \n\nan apple\n")
    (tmp_path / "b/c.json").write_text(json.dumps({"caption": "a dog", "url": "x"}))
    (tmp_path / "d.json").write_text(json.dumps({"url": "x"}))
    (tmp_path / "UPPER.TXT").write_text("a cat")
    expected = {"UPPER.JPG": "a cat", "a.png": "a red apple\nan apple", "b/c.png": "a dog"}
    assert captions_of(tmp_path) == (expected, {})


def test_captions_are_utf8(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_bytes("a café\n".encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes("a café\n".encode("latin-1"))
    (tmp_path / "captions.csv").write_bytes("image,caption\nc.png,a café\n".encode("utf-8-sig"))
    found, damaged = captions_of(tmp_path)
    assert found == dict.fromkeys(["a.png", "c.png"], "a café")
    assert list(damaged) == ["b.txt"] and "utf-8" in damaged["b.txt"]


def test_a_caption_has_a_line_each():
    text = "a dog\u2028runs\x0cfast\r\na cat\rasleep"
    assert parse_caption(text.encode(), ".txt") == "a dog runs fast\na cat\nasleep"
    for caption, expected in (
        ("one\ntwo", "one\ntwo"),
        (["one", "two\n more"], "one\ntwo more"),
        ([], ""),
        (None, ""),
    ):
        assert parse_caption(json.dumps({"caption": caption}).encode(), ".json") == expected
    for caption in (3, {"en": "one"}, ["one", None]):
        with pytest.raises(ValueError, match=r"whose 'caption' is .*, expected a text or a list of texts"):
            parse_caption(json.dumps({"caption": caption}).encode(), ".json")


def test_damaged_caption_files_are_listed(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.json").write_text('{"caption": "cut')
    (tmp_path / "b.txt").write_text("a" * captions.MAX_CAPTION_BYTES)
    (tmp_path / "c.txt").write_text("a" * (captions.MAX_CAPTION_BYTES + 1))
    os.mkfifo(tmp_path / "d.txt")  # opened, it would be waited for
    found, damaged = captions_of(tmp_path)
    assert list(found) == ["b.png"]
    assert list(damaged) == ["a.json", "c.txt", "d.txt"]
    assert "not a file" in damaged["d.txt"]
    assert "not JSON" in damaged["a.json"] and "more than 1,048,576 bytes" in damaged["c.txt"]


def test_caption_tables(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png", "captions.png")
    (tmp_path / "captions.txt").write_text('image,caption\na.png,a red apple\na.png,"one, two"\nimages/b.png,a dog, \n')
    assert captions_of(tmp_path)[0] == {"images/a.png": "a red apple\none, two", "images/b.png": "a dog"}
    # what stands beside the picture goes before the table; a table may lie anywhere
    (tmp_path / "images/b.txt").write_text("a cat")
    (tmp_path / "table.csv").write_text("id\tText\tFile\n1\ta pear\ta.png\n")
    assert captions_of(tmp_path)[0]["images/b.png"] == "a cat"
    assert captions_of(tmp_path, tmp_path / "table.csv")[0]["images/a.png"] == "a pear"
    (tmp_path / "table.json").write_text(json.dumps({"a.png": ["x", "y"], "captions.png": "z"}))
    expected = {"images/a.png": "x\ny", "images/b.png": "a cat", "captions.png": "z"}
    assert captions_of(tmp_path, tmp_path / "table.json")[0] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a.png,a red apple\n", "starts with 'a.png,a red apple', expected a header"),
        (
            "t.csv",
            b"image;caption\na.png;a dog\n",
            "starts with 'image;caption', expected .* save it as CSV UTF-8, comma",
        ),
        ("t.csv", "image,caption\na.png,café\n".encode("cp1252"), "codec can't decode .* save it as CSV UTF-8, comma"),
        ("t.json", b"{", "is not an object from file names"),
        ("t.json", b"[1]", "is not an object from file names"),
        ("t.json", b'{"a.png": 3}', "is not an object from file names"),
        ("t.json", b'{"a.png": {"caption": "a"}}', "is not an object from file names"),
        ("t.csv", b'image,caption,by\na.png,A dog\nb.png,"a, b",me,\nc.png,a,b,c\n', "line 4 has more fields than"),
        ("t.tsv", b'image\tcaption\na.png\t"Go, he said\nb.png\ta big" bus\n', r"t\.tsv: .* expected after"),
        ("t.tsv", b'image\tcaption\na.png\t"Go, he said\nb.png\tred\n', "unexpected end of data. .* Quote fields"),
    ],
)
def test_broken_caption_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValmError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_a_pipe_is_no_table(tmp_path, name):
    """Opened, it would be waited for."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(PermissionError, match="not a regular file"):
        read_table(tmp_path / name)


def test_a_file_name_alone_is_of_one_image(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\n1.png,a red ball\n2.png,two\nx/3.png,three\n")
    table = tmp_path / "t.csv"
    touch(tmp_path, "1.png", "b/1.png", "b/2.png", "x/3.png", "y/3.png")
    assert captions_of(tmp_path, table)[0] == {"1.png": "a red ball", "b/2.png": "two", "x/3.png": "three"}
    touch(tmp_path, "a/2.png")
    with pytest.raises(ValmError, match=r"2\.png in .*t\.csv is the name of 2 images, such as a/2\.png"):
        captions_of(tmp_path, table)


def test_a_name_may_lack_the_suffix(tmp_path):
    """As catalogues name images. A name with it goes first, and only one image may have a name without it."""
    (tmp_path / "t.csv").write_text("image,caption\n1903.7,harbour\nb/2,two\n3,three\n3.png,with it\n4.png,no jpg\n")
    images = dict.fromkeys(("a/1903.7.jpg", "b/2.png", "3.png", "c/4.jpg"), "")
    assert read_table(tmp_path / "t.csv").add_to(images) == ["3", "4.png"]
    assert images == {"a/1903.7.jpg": "harbour", "b/2.png": "two", "3.png": "with it", "c/4.jpg": ""}
    with pytest.raises(ValmError, match=r"1903\.7 in .* is the name of 2 images, such as a/1903\.7\.jpg"):
        read_table(tmp_path / "t.csv").add_to({"a/1903.7.jpg": "", "d/1903.7.png": ""})


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_rows_that_name_no_image_are_counted(tmp_path, name):
    """Another case, another folder, a missing picture, no name."""
    touch(tmp_path, "a/1.png", "b/1.png", "2.png", "2.txt")
    rows = [
        ("a/1.png", "one"),
        ("2.png", "two"),
        ("2.PNG", "two"),
        ("c/1.png", "one"),
        ("3.png", "three"),
        ("", "none"),
    ]
    lines = ["image,caption", *map(",".join, rows), "3.png,again", "4.png,"]
    (tmp_path / "2.txt").write_text("two")
    (tmp_path / name).write_text("\n".join(lines) if name == "t.csv" else json.dumps(dict(rows)))
    source = FolderSource(tmp_path, captions=tmp_path / name)
    count = 5 if name == "t.csv" else 4
    assert source.remarks[-1] == f"{count} rows of {name} name no image, such as '2.PNG'"
    assert captions_of(tmp_path, tmp_path / name)[0] == {"a/1.png": "one", "2.png": "two"}


def test_captions_of_google_takeout(tmp_path):
    """As Takeout writes them, with what stands in every folder of it."""
    names = {
        "IMG_0.jpg": "IMG_0.jpg.json",
        "IMG_0.png": "IMG_0.png.json",
        "IMG_1.JPG": "IMG_1.JPG.supplemental-metadata.json",
        "IMG_1(1).JPG": "IMG_1.JPG.supplemental-metadata(1).json",
        "IMG_2(12).jpeg": "IMG_2.jpeg(12).json",
        "A long name.jpg": "A long name.jpg.suppl.json",
    }
    touch(tmp_path, *names, "IMG_3.jpg", "IMG_4.heic", "a.small.jpg")
    for name, file in [*names.items(), ("", "IMG_3.jpg.json"), ("IMG_4", "IMG_4.heic.json"), ("small", "a.small.json")]:
        content = {"title": name, "description": f"{name}\nagain" if name else "", "geoData": {"latitude": 0.0}}
        (tmp_path / file).write_text(json.dumps(content, indent=2))
    (tmp_path / "metadata.json").write_text(json.dumps({"title": "Photos", "description": "an album"}, indent=2))
    expected = {name: f"{name}\nagain" for name in [*names]} | {"a.small.jpg": "small\nagain"}
    assert captions_of(tmp_path) == (expected, {})
    remark, without = FolderSource(tmp_path).remarks
    assert remark.startswith("files ignored: 1 .heic, 2 .json; HEIC") and without == "1 of 8 images have no caption"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_both_forms_of_unicode_are_the_same(tmp_path, form):
    """macOS decomposes the names of files, and a table or another program may not."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    image, beside = unicodedata.normalize(form, "é/é.png"), unicodedata.normalize(form, "ü.png")
    touch(tmp_path, image, beside)
    (tmp_path / unicodedata.normalize(other, "ü.txt")).write_text("beside")
    for table, name in (("t.csv", "é.png"), ("t.json", "é/é.png")):
        name = unicodedata.normalize(other, name)
        content = json.dumps({name: "a café"}) if table == "t.json" else f"image,caption\n{name},a café\n"
        (tmp_path / table).write_text(content, encoding="utf-8")
        assert captions_of(tmp_path, tmp_path / table)[0] == {image: "a café", beside: "beside"}
        (tmp_path / table).unlink()


def test_what_cannot_be_read_now_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "a.txt")
    monkeypatch.setattr("builtins.open", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ValmError, match=r"cannot read a\.txt: .*Input/output error\. Once it can be read"):
        captions_of(tmp_path)
