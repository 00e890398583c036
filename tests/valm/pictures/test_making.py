"""What is checked before the first stage, and the folder of the parts."""

import json

import pytest

from tests.valm.pictures.conftest import draw
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.pictures.making import Making, captions_of, look
from valm.pictures.plan import PicturesPlan


def making(pictures, out, **more):
    plan = PicturesPlan(pictures=pictures, model="base", out=out, **more)
    return Making(plan, look(plan))


def test_looks_at_pictures_and_captions(drawn, tmp_path):
    found = making(drawn, tmp_path / "out").found
    assert (len(found.records), len(found.captioned), len(found.texts)) == (24, 24, 48)
    assert found.texts[:2] == ["a red ellipse on a green ground", "the ellipse is red"]


def test_without_captions_a_clip_and_a_text_are_needed(tmp_path):
    bare, text = draw(tmp_path / "bare", 3, captions=False), tmp_path / "notes.txt"
    text.write_text("a red boat\n")
    for more in ({}, {"clip": "clip"}, {"text": text}):
        with pytest.raises(ValmError, match=r"no picture .* has a caption: write NAME.txt .*--clip.*--text"):
            making(bare, tmp_path / "out", **more)
    assert making(bare, tmp_path / "out", clip="clip", text=text).found.texts == ["a red boat"]


def test_the_folder_is_claimed_once_and_continued_with_the_same_options(drawn, tmp_path):
    making(drawn, tmp_path / "out").begin()
    about = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert about["parts"]["model"] == "model" and "base" not in about["parts"]
    making(drawn, tmp_path / "out").begin()
    (tmp_path / "out" / "clip").mkdir()
    with pytest.raises(ValmError, match=r"was begun otherwise: its --steps is not given, here it is '3'"):
        making(drawn, tmp_path / "out", steps=3).begin()
    with pytest.raises(ValmError, match="its pictures and captions is"):
        making(draw(tmp_path / "others", 5), tmp_path / "out").begin()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(ValmError, match=r"full is not empty \(it contains letter.txt\): choose another folder"):
        making(drawn, tmp_path / "full").begin()


def test_options_that_failed_before_the_first_part_may_change(drawn, tmp_path):
    making(drawn, tmp_path / "out", clip="ViT-B-33").begin()
    making(drawn, tmp_path / "out", steps=3).begin()
    settings = json.loads((tmp_path / "out" / "pictures.json").read_text())["settings"]
    assert settings["--clip"] is None and settings["--steps"] == "3"


def test_a_damaged_picture_is_counted_and_its_captions_are_no_text(tmp_path):
    pictures = draw(tmp_path / "pictures", 4)
    (pictures / "0.png").write_bytes(b"not a picture")
    make_clip(prune_tokenizer(clip_tokenizer(), ["a red ellipse"])).save(tmp_path / "clip")
    work = making(pictures, tmp_path / "out", clip=str(tmp_path / "clip"))
    work.begin()
    assert work.make_kb() == "3 pictures; 1 not readable, such as 0.png"
    assert len(list(captions_of(ImageKnowledgeBase.open(tmp_path / "out" / "kb")))) == 6


def test_smollm2_is_converted_unless_a_folder_has_that_name(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = PicturesPlan(pictures=drawn, model="smollm2", out="out")
    assert Making(plan, look(plan)).base == "out/smollm2"
    (tmp_path / "smollm2").mkdir()
    assert Making(plan, look(plan)).base == "smollm2"
