import errno
import io
import os

import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import COUNT, build_folder, png, touch
from valm.clip.read_image import read_image
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource, TableSource, find_images, table_records


def test_odd_files_are_listed_and_names_written_down(clip, tmp_path):
    """A pipe, a link to nothing, names and captions that are no UTF-8, a caption file cut short."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png", os.fsdecode(b"c\xe9.png")):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "a.json").write_text(r'{"caption": "half \ud83d of it"}')
    (folder / "b.json").write_text('{"caption": "cut')
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    kb = build_folder(folder, tmp_path / "kb", clip, shard_size=100)
    found = [(kb.item(number).uri, kb.item(number).caption) for number in range(len(kb))]
    assert found == [("a.png", "half \ufffd of it"), ("b.png", ""), ("c\ufffd.png", "")]
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert sorted(skipped) == ["b.json", "link.png", "pipe.png"]
    assert "not JSON" in skipped["b.json"] and "no file" in skipped["link.png"] == skipped["pipe.png"]


def test_captions_and_shards_are_told_apart(folder, tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\np05_cut.png,cut\n")
    source = FolderSource(folder, shard_size=10)
    contents = [part.content for part in source.parts()]
    assert source.count == len(contents) == -(-(COUNT + 3) // 10)
    assert source.plan() == {"source": "folder", "shard_size": 10}
    other = FolderSource(folder, captions=tmp_path / "captions.csv", shard_size=10)
    assert [part.content for part in other.parts()] != contents


def test_a_table_that_was_not_read_is_among_the_files_ignored(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "notes.csv")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    first = f"if notes.csv is a table of captions, give --captions {tmp_path}/notes.csv"
    assert FolderSource(tmp_path).remarks == ["files ignored: 2 .csv", "2 of 2 images have no caption", first]
    (tmp_path / "notes.csv").rename(tmp_path / "my captions.csv")
    assert FolderSource(tmp_path).remarks[2].endswith(f"give --captions '{tmp_path}/my captions.csv'")
    (tmp_path / "my captions.csv").unlink()
    (tmp_path / "train" / "metadata.csv").rename(tmp_path / "captions.csv")
    assert FolderSource(tmp_path).remarks == ["1 of 2 images have no caption"]


def test_pictures_are_found_in_order_and_what_is_passed_over_is_counted(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.png", "a/.hidden.png", ".git/x.png", "c.webp", "x.svg", "b/y.svg", "README")
    assert find_images(tmp_path) == ["a/z.png", "b.JPG", "c.webp"]
    ignored, _ = FolderSource(tmp_path).remarks
    assert ignored.startswith("files ignored: 1 without a suffix, 2 .svg; SVG is not read: ")


def test_missing_and_empty_folders(tmp_path):
    touch(tmp_path, "notes.txt")
    for folder, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "nowhere"),
        (tmp_path / "notes.txt", NotADirectoryError, "notes.txt"),
        (tmp_path, ValmError, r"no images in .*looked for files ending in .*\.png"),
    ):
        with pytest.raises(error, match=message):
            find_images(folder)


def test_links_are_followed_once(tmp_path):
    """A folder has its own name, whatever links to it."""
    touch(tmp_path / "pictures", "a.png", "b/c.png")
    touch(tmp_path / "other", "d.png", "deep/e.png")
    links = {"1": tmp_path / "other" / "deep", "2": tmp_path, "3": tmp_path / "pictures" / "b"}
    for name, target in links.items():
        (tmp_path / "pictures" / name).symlink_to(target)
    (tmp_path / "other" / "back").symlink_to(tmp_path / "pictures")
    assert find_images(tmp_path / "pictures") == ["1/e.png", "2/other/d.png", "a.png", "b/c.png"]


def test_what_cannot_be_read_now_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b/c.png")

    def denied(path, *_):
        raise OSError(errno.EIO, "Input/output error", str(path))

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: denied(path) if str(path).endswith("b") else scandir(path))
    with pytest.raises(OSError, match=r"Input/output error: .*/b"):
        find_images(tmp_path)


def test_formats_that_are_not_read_have_a_remedy(tmp_path):
    """By the suffix in a folder, by the content of a file: phones write HEIC that is named .jpg."""
    (tmp_path / "a.HEIC").touch()
    message = r"no images in .*; HEIC is not read: convert it to JPEG, such as by ImageMagick"
    with pytest.raises(ValmError, match=message):
        find_images(tmp_path)
    heic, svg = b"\0\0\0\x24ftypheic\0\0\0\0mif1", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
    for content, remedy in ((heic, "it is HEIC, convert it to JPEG"), (svg, "it is SVG, convert it to PNG")):
        (tmp_path / "a.jpg").write_bytes(content)
        for source in (io.BytesIO(content), tmp_path / "a.jpg"):
            with pytest.raises(ValueError, match=f"not a picture in one of the formats JPEG, .*: {remedy}"):
                read_image(source)


@pytest.fixture
def table(tmp_path):
    """A CSV beside a folder of five images, one of them damaged, with a row each; and rows of what is not there."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = ["Caption,id,Path"]
    for number in range(5):
        (folder / "images" / f"{number}.png").write_bytes(png(number) if number != 2 else b"no image")
        rows.append(f'"image, number {number}",{number},images/{number}.png')
    rows += ["again,5,images/0.png", "gone,6,images/none.png", "nameless,7, ", f"too long,8,{'x' * 300}.png"]
    (folder / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "table.csv"


def test_images_captions_and_what_is_skipped(table, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative to the table, not to where valm runs
    kb = build(TableSource("data/table.csv"), tmp_path / "kb", clip, progress=False)
    assert [(kb.item(id).uri, kb.item(id).caption) for id in range(len(kb))] == [
        ("images/0.png", "image, number 0\nagain"),
        ("images/1.png", "image, number 1"),
        ("images/3.png", "image, number 3"),
        ("images/4.png", "image, number 4"),
    ]
    assert kb.item(0).width == 30 and kb.thumbnail(0).size == (30, 20)
    skipped = {entry["uri"]: entry["reason"] for entry in kb.skipped()}
    assert list(skipped) == ["images/2.png", "images/none.png", f"{'x' * 300}.png", "table.csv, row 8"]
    assert "not a picture" in skipped["images/2.png"] and "no file" in skipped["images/none.png"]
    assert skipped["table.csv, row 8"] == "it names no image"
    assert kb.manifest["plan"]["source"] == "table"
    assert len(build(TableSource("data/table.csv"), tmp_path / "kb", clip, progress=False)) == 4  # just opened


def test_tabs_absolute_paths_and_named_columns(table, tmp_path):
    image = table.parent / "images" / "3.png"
    (tmp_path / "table.tsv").write_text(f"text\tbetter\tphoto\na, b\tc, d\t{image}\n")
    for column, caption in ((None, "a, b"), ("Better", "c, d")):
        (record,) = table_records(tmp_path / "table.tsv", "photo", column)
        assert (record.source, record.uri, record.caption) == (image, str(image), caption)


def test_wrong_tables(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        TableSource(tmp_path / "none.csv")
    with pytest.raises(ValmError, match=r"starts with 'Caption,id,Path', expected a header with a column photo and"):
        TableSource(table, image_column="photo")
    with pytest.raises(
        ValmError, match=r"expected a header with a column image or file or .* and a column text\. In a spreadsheet"
    ):
        TableSource(table, caption_column="text")
    table.write_bytes(b"\xff\xfeimage")  # UTF-16, cut in the middle of a character
    with pytest.raises(ValmError, match=r"cannot read the caption table .*table\.csv: 'utf-8' codec"):
        TableSource(table)
    table.write_text("image,caption\n")
    with pytest.raises(ValmError, match=r"the table .*table\.csv has a header but no rows"):
        TableSource(table)
