import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import build_folder
from valm.knowledge_base.contact_sheet import CELL, contact_sheet


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


def test_an_accent_may_be_a_character_of_its_own(below):
    assert (below("u\u0308ber") == below("über")).all()


@pytest.mark.parametrize("caption", ["M" * 100, "犬" * 100, "the widest words of WWWWWWWWWWWW MMMMMMMMMMMMM"])
def test_a_caption_stays_below_its_image(below, caption):
    ink = below(caption)
    assert ink[:, 8 : 8 + CELL].any() and not ink[:, 8 + CELL : 8 + CELL + 8].any()
