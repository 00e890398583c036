import json

from PIL import Image

from tests.valm.cli.commands import THINGS


def test_clip_check(world, tmp_path, output_of):
    check = ["clip", "check", "--clip", world / "clip"]
    out = output_of(*check, world / "pictures")
    assert "6 images with 6 captions" in out and "image to text  recall@10" in out and "zero-shot" not in out
    for name, color in THINGS.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(3 if name != "coal" else 2):
            Image.new("RGB", (40, 40), color).save(tmp_path / "classes" / name / f"{number}.png")
    (tmp_path / "check.json").symlink_to("there.json")
    out = output_of(*check, tmp_path / "classes", "--out", tmp_path / "check.json")
    assert "17 images of 6 classes, chance 0.167" in out and "skipped: a class contains fewer than 3" in out
    assert json.loads((tmp_path / "there.json").read_text())["retrieval"] is None
    Image.new("RGB", (40, 40)).save(tmp_path / "classes" / "coal" / "2.png")
    assert "linear probe  1.000" in output_of(*check, tmp_path / "classes")


def test_pictures_without_labels_are_one_sentence(sentence, tmp_path):
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "x.png")
    sentence("clip check {tmp}/bare --clip {world}/clip", "nothing to check")
