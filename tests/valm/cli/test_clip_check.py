import json

from PIL import Image

from tests.valm.cli.commands import THINGS, run


def test_clip_check(world, tmp_path, capsys):
    check = ["clip", "check", "--clip", world / "clip"]
    assert run(*check, world / "pictures") == 0
    out = capsys.readouterr().out
    assert "6 images with 6 captions" in out and "image to text  recall@10" in out and "zero-shot" not in out
    for name, color in THINGS.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(3 if name != "coal" else 2):
            Image.new("RGB", (40, 40), color).save(tmp_path / "classes" / name / f"{number}.png")
    (tmp_path / "check.json").symlink_to("there.json")
    assert run(*check, tmp_path / "classes", "--out", tmp_path / "check.json") == 0
    out = capsys.readouterr().out
    assert "17 images of 6 classes, chance 0.167" in out and "skipped: a class has fewer than 3" in out
    assert json.loads((tmp_path / "there.json").read_text())["retrieval"] is None
    Image.new("RGB", (40, 40)).save(tmp_path / "classes" / "coal" / "2.png")
    assert run(*check, tmp_path / "classes") == 0
    assert "linear probe  1.000" in capsys.readouterr().out


def test_pictures_without_labels_are_one_sentence(sentence, tmp_path):
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "x.png")
    sentence(["clip", "check", "{tmp}/bare", "--clip", "{world}/clip"], "nothing to check")
