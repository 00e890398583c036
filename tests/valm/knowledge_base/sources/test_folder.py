import os

from PIL import Image

from tests.valm.knowledge_base.inputs import COUNT, build_folder, touch
from valm.knowledge_base.sources.folder import FolderSource


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


def test_a_plan_tells_captions_and_shards_apart(folder, tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\np05_cut.png,cut\n")
    source = FolderSource(folder, shard_size=10)
    assert source.count == len(list(source.shards({}))) == -(-(COUNT + 3) // 10)
    plan = source.plan()
    assert (plan["source"], plan["shard_size"]) == ("folder", 10)
    assert FolderSource(folder, captions=tmp_path / "captions.csv", shard_size=10).plan() != plan
    assert FolderSource(folder, shard_size=11).plan() == plan | {"shard_size": 11}


def test_a_table_that_was_not_read_is_among_the_files_ignored(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "notes.csv")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    none = "2 of 2 images have no caption"
    assert FolderSource(tmp_path).remarks == [
        "files ignored: 2 .csv",
        f"{none}: if a table in the folder has them, give it as --captions TABLE (CSV, TSV or JSON)",
    ]
    read = FolderSource(tmp_path, captions=tmp_path / "train" / "metadata.csv")
    assert read.remarks == ["files ignored: 1 .csv", "1 of 2 images have no caption"]
    (tmp_path / "notes.csv").unlink()
    (tmp_path / "train" / "metadata.csv").rename(tmp_path / "captions.csv")
    assert FolderSource(tmp_path).remarks == ["1 of 2 images have no caption"]
    (tmp_path / "captions.csv").write_text("image,caption\npics/a.png,a dog\n")
    unused, without = FolderSource(tmp_path).remarks
    assert "such as 'pics/a.png'" in unused and without == none
