import io
import os
import signal
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.valm.killed import exit_code_if_killed, needs_fork
from tests.valm.knowledge_base.inputs import png
from tests.valm.tiny_clip import make_clip
from valm.clip.read_image import IMAGE_FORMATS
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.dataset import DatasetSource, open_dataset

PICTURES = [png(seed) for seed in range(7)]
CAPTIONS = ["a red  apple", None, "", "4", "5", "6", "7"]


def make_dataset(**columns):
    images = [{"bytes": picture, "path": f"/somewhere/{n}.png"} for n, picture in enumerate(PICTURES)]
    images[1] = {"bytes": b"broken", "path": "broken.png"}
    images[2] = None
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    columns = {"image": images, "caption": CAPTIONS, "label": list(range(7))} | columns
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def same_pictures(kb, clip, seeds):
    expected = clip.encode_images([Image.open(io.BytesIO(PICTURES[seed])) for seed in seeds]).numpy()
    return len(kb) == len(seeds) and np.abs(kb.vectors() - expected).max() <= 2**-12 + 1e-5


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset(dataset, clip, tmp_path, streamed):
    source = DatasetSource(dataset.to_iterable_dataset() if streamed else dataset, shard_size=3)
    kb = build(source, tmp_path, clip, progress=False)
    assert same_pictures(kb, clip, [0, 3, 4, 5, 6])
    assert [kb.item(n).uri for n in range(5)] == ["0/0.png", "3/3.png", "4/4.png", "5/5.png", "6/6.png"]
    assert [kb.item(n).caption for n in range(2)] == ["a red apple", "4"]
    assert {entry["uri"]: entry["reason"] for entry in kb.skipped()} == {
        "1/broken.png": f"not a picture in one of the formats {', '.join(IMAGE_FORMATS)}",
        "2": "there is no picture",
    }
    assert kb.thumbnail(0).size == (30, 20)
    assert [shard["skipped"] for shard in kb.manifest["shards"]] == [2, 0, 0]


def test_rows_of_any_kind(clip, tmp_path):
    """Pictures as bytes, paths and PIL pictures, several captions, columns of other names."""
    (tmp_path / "3.png").write_bytes(PICTURES[3])
    rows = [
        {"picture": PICTURES[0], "sentences": ["one ", "", "two\nlines"]},
        {"picture": Image.open(io.BytesIO(PICTURES[1])), "sentences": []},
        {"picture": str(tmp_path / "3.png"), "sentences": "three"},
        {"picture": {"path": str(tmp_path / "3.png"), "bytes": None}, "sentences": None},
        {"picture": str(tmp_path / "none.png"), "sentences": None},
    ]
    kb = build(DatasetSource(rows, image_column="picture"), tmp_path / "kb", clip, progress=False)
    assert same_pictures(kb, clip, [0, 1, 3, 3])
    assert [kb.item(n).caption for n in range(4)] == ["one\ntwo lines", "", "three", ""]
    assert [kb.item(n).uri for n in range(3)] == ["0", "1", "2/3.png"]
    assert [entry["uri"] for entry in kb.skipped()] == ["4/none.png"]


@needs_fork
def test_a_killed_build_goes_on_and_encodes_nothing_twice(dataset, clip, tmp_path, monkeypatch):
    whole = build(DatasetSource(dataset, shard_size=2), tmp_path / "whole", clip, progress=False)

    def build_again():
        build(DatasetSource(make_dataset(), shard_size=2), tmp_path / "kb", clip, progress=False)

    assert exit_code_if_killed(build_again, 6) == -signal.SIGKILL
    done = len(list((tmp_path / "kb").glob("shard-*.json")))
    encoded = []
    encode_images = clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode_images(pixels))
    kb = build(DatasetSource(dataset, shard_size=2), tmp_path / "kb", clip, progress=False)
    assert kb.fingerprint == whole.fingerprint
    assert sum(encoded) == 5 - sum(shard["count"] for shard in kb.manifest["shards"][:done])


@pytest.mark.parametrize("how", ["pixels", "bytes"])
def test_images_in_memory_are_known_by_what_they_show(clip, tmp_path, how):
    """Pictures of the same size are not the same."""

    def rows(*colours):
        files = [io.BytesIO() for _ in colours]
        for colour, file in zip(colours, files, strict=True):
            Image.new("RGB", (32, 32), colour).save(file, "BMP")
        return [{"image": Image.open(file) if how == "pixels" else file.getvalue()} for file in files]

    class Interrupted(list):
        def __iter__(self):
            yield from super().__iter__()
            raise KeyboardInterrupt

    given = rows("red", "green", "blue")
    with pytest.raises(KeyboardInterrupt):
        build(DatasetSource(Interrupted(given), shard_size=2), tmp_path, clip, progress=False)
    for other in (rows("red", "white", "blue"), rows("green", "red", "blue")):
        with pytest.raises(ValmError, match="has changed since"):
            build(DatasetSource(other, shard_size=2), tmp_path, clip, progress=False)
    assert len(build(DatasetSource(given, shard_size=2), tmp_path, clip, progress=False)) == 3


@pytest.mark.parametrize("stored", [str, lambda path: {"bytes": None, "path": str(path)}])
def test_a_picture_that_a_row_names_and_that_was_written_since_is_named(clip, tmp_path, stored):
    rows = []
    for number, picture in enumerate(PICTURES[:2]):
        (tmp_path / f"{number}.png").write_bytes(picture)
        os.utime(tmp_path / f"{number}.png", (1, 1))
        rows.append({"image": stored(tmp_path / f"{number}.png")})
    build(DatasetSource(rows), tmp_path / "kb", clip, progress=False)
    (tmp_path / "1.png").write_bytes(PICTURES[1][::-1])
    with pytest.warns(UserWarning, match=r"1\.png was written since the knowledge base .* was built"):
        build(DatasetSource(rows), tmp_path / "kb", clip, progress=False)


def test_a_dataset_that_has_changed_is_refused(clip, tmp_path):
    rows = [{"image": picture, "caption": ""} for picture in PICTURES]

    class Broken(list):
        def __iter__(self):
            yield from rows[:5]
            raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        build(DatasetSource(Broken(rows), shard_size=2), tmp_path, clip, progress=False)
    other = [*rows[:2], {"image": PICTURES[2], "caption": "new"}, *rows[3:]]
    for changed, part in ((other, 1), (rows[:2], 1)):
        with pytest.raises(ValmError, match=rf"has changed since .* was begun \(its part {part}\)"):
            build(DatasetSource(changed, shard_size=2), tmp_path, clip, progress=False)
    assert len(build(DatasetSource(rows, shard_size=2), tmp_path, clip, progress=False)) == 7
    for changed, part in ((other, 1), (rows[:2], 1), (rows[1:], 0), ([*rows, rows[0]], 3)):
        with pytest.raises(ValmError, match=rf"has changed since .* was begun \(its part {part}\)"):
            build(DatasetSource(changed, shard_size=2), tmp_path, clip, progress=False)


def test_a_stream_of_another_length_is_refused(dataset, clip, tmp_path, monkeypatch):
    stream = dataset.to_iterable_dataset()
    build(DatasetSource(stream.take(4), shard_size=2), tmp_path / "longer", clip, progress=False)
    with pytest.raises(ValmError, match=r"has changed since .* \(its part 2\)"):
        build(DatasetSource(stream, shard_size=2), tmp_path / "longer", clip, progress=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("valm.knowledge_base.build.finish_knowledge_base", Mock(side_effect=KeyboardInterrupt))
        build(DatasetSource(stream, shard_size=2), tmp_path / "shorter", clip, progress=False)
    with pytest.raises(ValmError, match=r"has changed since .* \(its part 2\)"):
        build(DatasetSource(stream.take(4), shard_size=2), tmp_path / "shorter", clip, progress=False)


@pytest.mark.parametrize(
    ("value", "caption"), [(["a", None, " b "], "a\nb"), (None, ""), ({"raw": "a"}, None), (b"a", None), ([3], None)]
)
def test_captions_are_texts(clip, tmp_path, value, caption):
    rows = [{"image": PICTURES[0], "caption": "first"}, {"image": PICTURES[1], "caption": value}]
    source = DatasetSource(rows)
    if caption is None:
        message = "row 1: 'caption' is .*, expected a text or a list of texts: name another"
        with pytest.raises(ValmError, match=message):
            list(source.images())
    else:
        assert [record.caption for record in source.images()] == ["first", caption]


def test_wrong_datasets(dataset, clip, tmp_path):
    def fails(message, rows, **options):
        with pytest.raises(ValmError, match=message):
            build(DatasetSource(rows, **options), tmp_path / "kb", clip, progress=False)

    fails("has no rows", [])
    fails("is an iterator, which can be read only once", iter([{"image": PICTURES[0]}]))
    fails("has no column 'picture', only image, caption, label", dataset, image_column="picture")
    fails("has no column 'text', only image, caption, label", dataset, caption_column="text")
    assert not (tmp_path / "kb").exists()
    unreadable = dataset.select([1, 2])
    fails(r"none of the 2 images could be read; the first, 0/broken\.png", unreadable)


def test_rows_that_come_after_a_knowledge_base_are_compared_too(clip, tmp_path):
    rows = [{"image": PICTURES[0], "caption": str(number)} for number in range(5)]
    first = build(DatasetSource(rows[:3], shard_size=2), tmp_path / "first", clip, progress=False)

    def add(rows):
        return build(DatasetSource(rows, shard_size=2), tmp_path / "kb", clip, after=first, progress=False)

    kb = add(rows)
    assert [kb.item(id).caption for id in range(8)] == list("01201234") and kb.verify(progress=False) == []
    assert add(rows).fingerprint == kb.fingerprint
    rows[4] = {"image": PICTURES[0], "caption": "9"}
    with pytest.raises(ValmError, match=r"has changed since .* was begun \(its part 4\)"):
        add(rows)
    with pytest.raises(ValmError, match="was built with the CLIP"):
        build(DatasetSource(rows), tmp_path / "other", make_clip(clip.tokenizer, seed=5), after=first, progress=False)


def test_the_column_of_images_is_known(dataset):
    """From what the dataset says of it, if it is one."""
    renamed = dataset.rename_column("image", "photo")
    assert DatasetSource(renamed).image_column == "photo"
    both = renamed.add_column("more", dataset["label"])
    both = both.cast_column("more", datasets.Value("string")).cast_column("more", datasets.Image())
    with pytest.raises(ValmError, match=r"has no column 'image', only .*: name one \(--columns\)"):
        DatasetSource(both)
    assert DatasetSource(both, image_column="photo").plan()["columns"][0] == "photo"
    assert DatasetSource(both.rename_column("more", "image")).image_column == "image"


def test_datasets_are_opened(dataset, clip, tmp_path):
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "several")
    assert len(open_dataset(tmp_path / "one")) == len(open_dataset(f"{tmp_path}/several::test")) == 7
    with pytest.raises(ValmError, match=r"cannot read the dataset .*several \(default:train\): "):
        open_dataset(tmp_path / "several")
    for wrong, reason in (
        (":train[:10%]", r"\(default:train\[:10%\]\): it was saved as one split"),
        (":test", r"\(default:test\): it was saved as one split"),
        ("some", r"\(some:train\): it was saved without configs"),
    ):
        with pytest.raises(ValmError, match=f"cannot read the dataset .*one {reason}: leave the (split|config) out"):
            open_dataset(f"{tmp_path}/one:{wrong}")
    with pytest.raises(ValmError, match="it was saved without configs"):
        open_dataset(f"{tmp_path}/several:some:test")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    assert open_dataset(f"{tmp_path}/parquet::train[3:5]")["label"] == dataset[3:5]["label"]
    assert len(open_dataset(f"{tmp_path}/parquet:default:train[:2]")) == 2
    streamed = open_dataset(tmp_path / "parquet", streaming=True)
    assert same_pictures(build(DatasetSource(streamed), tmp_path / "kb", clip, progress=False), clip, [0, 3, 4, 5, 6])
    with pytest.raises(ValmError, match="cannot read the dataset"):
        open_dataset(tmp_path / "none")
