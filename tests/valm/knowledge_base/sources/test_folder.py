import os

from PIL import Image

from tests.valm.knowledge_base.inputs import COUNT, build_folder
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
