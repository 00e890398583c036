import dataclasses
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageFont

from tests.valm.knowledge_base.inputs import build_folder
from valm.knowledge_base import contact_sheet as contact_sheets
from valm.knowledge_base.contact_sheet import CELL, contact_sheet, undrawable


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
    for title in ("nothing", "of two\nlines", "\udcff \0 \r"):
        assert contact_sheet(kb, [], title).height < CELL


@pytest.fixture
def below(make_kb):
    """What is drawn below one image with this caption, as an array that is True where there is ink."""
    kb = make_kb(2)

    def ink(caption):
        item = dataclasses.replace(kb.item(0), caption=caption)
        sheet = contact_sheet(kb, [(0.5, item), (0.5, kb.item(1))], "")
        return np.asarray(sheet.convert("L"))[31 + CELL + 2 + 15 :] < 128  # below the score

    return ink


def left(ink):
    return ink[:, : 8 + CELL]


@pytest.mark.parametrize("one, other", [("ü", "ö"), ("é", "ß"), ("я", "ж"), ("犬 ü", "犬 ö"), ("собака ü", "собака ö")])
def test_letters_are_no_boxes(below, one, other):
    """Boxes for missing letters would be equal."""
    pytest.importorskip("matplotlib", reason="brings DejaVu")
    assert len({left(below(text)).tobytes() for text in (one, other, one.replace(one[-1], "?"))}) == 3
    assert undrawable(one[-1]) == ""


def test_an_accent_may_be_a_character_of_its_own(below):
    assert (below("u\u0308ber") == below("über")).all()


def test_without_fonts_there_are_question_marks(below, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("fc-match")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(contact_sheets, "_fonts", lambda size: [ImageFont.load_default(size)])
    for cached in (contact_sheets._font, contact_sheets._system_font):
        cached.cache_clear()
    assert undrawable("über\nüber 犬") == "ü犬"
    assert left(below("über 犬")).any() and (below("über 犬") == below("?ber ?")).all()
    for cached in (contact_sheets._font, contact_sheets._system_font):
        cached.cache_clear()


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="needs fontconfig")
def test_a_font_of_the_system_is_asked_for_what_others_have_not(monkeypatch):
    file, _ = contact_sheets._system_font("ü")
    monkeypatch.setattr(contact_sheets, "_fonts", lambda size: [ImageFont.load_default(size)])
    contact_sheets._font.cache_clear()
    assert contact_sheets._font("a", 12).getname() == ImageFont.load_default(12).getname()
    assert contact_sheets._font("ü", 12).path == file
    contact_sheets._font.cache_clear()


@pytest.mark.parametrize("caption", ["M" * 100, "犬" * 100, "the widest words of WWWWWWWWWWWW MMMMMMMMMMMMM"])
def test_a_caption_stays_below_its_image(below, caption):
    ink = below(caption)
    assert ink[:, 8 : 8 + CELL].any() and not ink[:, 8 + CELL : 8 + CELL + 8].any()
