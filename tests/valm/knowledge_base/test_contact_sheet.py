import dataclasses
import shutil
import subprocess

import pytest
from PIL import Image, ImageFont

from tests.valm.knowledge_base.inputs import build_folder
from valm.knowledge_base.contact_sheet import CELL, _system_font, contact_sheet, font_for


def test_pictures_stand_in_rows(make_kb):
    kb = make_kb(6)
    results = [(0.5, kb.item(index)) for index in (3, 1, 4, 0, 5)]
    sheet = contact_sheet(kb, results, "five colours")
    assert sheet.width > 4 * CELL
    assert sheet.height > 2 * CELL
    # pictures of one colour: the first stands at the left of the first row, the fifth below it
    for number, row in ((0, 0), (4, 1)):
        expected = kb.thumbnail(results[number][1].id).getpixel((16, 16))
        middle = (8 + CELL // 2, (sheet.height - 31) // 2 * row + 31 + CELL // 2)
        assert sheet.getpixel(middle) == expected


def test_without_thumbnails_or_results(clip, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pictures" / "red.png")
    kb = build_folder(tmp_path / "pictures", tmp_path / "kb", clip, thumbnails=0)
    item = dataclasses.replace(kb.item(0), caption="a very long caption " * 20)
    sheet = contact_sheet(kb, [(0.1, item)], "red")
    assert sheet.getpixel((8 + CELL // 2, 31 + CELL // 2)) == (255, 255, 255)
    assert contact_sheet(kb, [], "nothing").height < CELL


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="needs fontconfig")
@pytest.mark.parametrize(("one", "other"), [("собака", "кошкаа"), ("σκύλος", "γάταγά")])
def test_captions_beyond_latin_are_drawn(one, other):
    if _system_font(one[0]) is None:
        pytest.skip("no font of the system has these letters")
    masks = [bytes(font_for(text, 12).getmask(text)) for text in (one, other)]
    assert masks[0] != masks[1]  # boxes for missing letters would be equal


def test_without_fontconfig_the_own_font_is_taken(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("fc-match")

    monkeypatch.setattr(subprocess, "run", missing)
    _system_font.cache_clear()
    assert font_for("一只狗", 12).getname() == ImageFont.load_default(12).getname()
    _system_font.cache_clear()
