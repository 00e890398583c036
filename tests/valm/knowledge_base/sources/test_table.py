import signal

import numpy as np
import pytest

from tests.valm.killed import exit_code_if_killed, needs_fork
from tests.valm.knowledge_base.inputs import contents, png
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.table import TableSource, table_records


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


def test_tabs_absolute_paths_and_named_columns(table, tmp_path):
    image = table.parent / "images" / "3.png"
    (tmp_path / "table.tsv").write_text(f"text\tbetter\tphoto\na, b\tc, d\t{image}\n")
    for column, caption in ((None, "a, b"), ("Better", "c, d")):
        (record,) = table_records(tmp_path / "table.tsv", "photo", column)
        assert (record.source, record.uri, record.caption) == (image, str(image), caption)


def test_wrong_tables(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        TableSource(tmp_path / "none.csv")
    with pytest.raises(ValmError, match=r"starts with 'Caption,id,Path'; expected a header with a column photo and"):
        TableSource(table, image_column="photo")
    with pytest.raises(ValmError, match=r"expected a header with a column image or file or .* and a column text$"):
        TableSource(table, caption_column="text")
    table.write_bytes(b"\xff\xfeimage")  # UTF-16, cut in the middle of a character
    with pytest.raises(ValmError, match=r"cannot read the caption table .*table\.csv: 'utf-16-le' codec"):
        TableSource(table)
    table.write_text("image,caption\n")
    with pytest.raises(ValmError, match=r"the table .*table\.csv has a header but no rows"):
        TableSource(table)


@needs_fork
@pytest.mark.parametrize("point", [2, 7])
def test_a_killed_build_goes_on_to_the_same_bytes(table, clip, tmp_path, point):
    def run(name):
        return build(TableSource(table, shard_size=2), tmp_path / name, clip, progress=False)

    whole = run("whole")
    assert [shard["count"] for shard in whole.manifest["shards"]] == [2, 1, 1, 0]
    assert exit_code_if_killed(lambda: run("killed"), point) == -signal.SIGKILL
    assert np.array_equal(run("killed").vectors(), whole.vectors())
    assert contents(tmp_path / "killed") == contents(whole.path)


@pytest.mark.parametrize("change", ["caption", "image"])
def test_a_table_that_has_changed_is_refused(table, clip, tmp_path, change):
    build(TableSource(table), tmp_path / "kb", clip, progress=False)
    if change == "caption":
        table.write_text(table.read_text().replace("again", "once more"))
    else:
        (table.parent / "images" / "1.png").write_bytes(png(1) + b"longer")
    with pytest.raises(ValmError, match=r"already holds a knowledge base .* \(fingerprint differ\)"):
        build(TableSource(table), tmp_path / "kb", clip, progress=False)
