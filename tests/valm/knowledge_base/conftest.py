import copy

import numpy as np
import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import COUNT, build_folder, png, write_tar


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """23 small pictures, and three unreadable files: cut short, not a picture, too large."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (24 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index:02d}.png")
        (folder / f"p{index:02d}.txt").write_text(f"picture number {index}")
    whole = (folder / "p05.png").read_bytes()
    (folder / "p05_cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "p09_text.jpg").write_text("this is no picture")
    Image.new("1", (9000, 9000)).save(folder / "p11_bomb.png")
    return folder


@pytest.fixture(scope="session")
def kb(folder, clip, tmp_path_factory):
    unsaved = copy.copy(clip)  # independent of what the first module did with it
    unsaved.source = None
    return build_folder(folder, tmp_path_factory.mktemp("kb"), unsaved)


@pytest.fixture
def tars(tmp_path):
    """Two archives in img2dataset's layout, with a broken picture, a second picture of a sample, and odd names."""
    folder = tmp_path / "tars"
    folder.mkdir()
    caption = b'{"caption": "a red apple", "url": "x"}'
    first = [("000.png", png(0)), ("000.txt", b"a red  apple\n"), ("000.json", caption), ("001.png", b"broken")]
    first += [("002.json", b'{"caption": null}'), ("002.png", png(2)), ("002.mask.png", png(99))]
    second = [("../../escape.png", png(3)), ("b/004.json", b'{"caption": "4"}'), ("b/004.png", png(4))]
    write_tar(folder / "00000.tar", first)
    write_tar(folder / "00001.tar", second)
    return folder
