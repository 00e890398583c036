"""Drawn pictures with captions, and a tiny decoder."""

import pytest
from PIL import Image, ImageDraw

from tests.valm.models import llama_of
from tests.valm.other_tokenizers import gpt2_like

COLORS = ("red", "green", "blue", "yellow", "black", "white")


def draw(folder, count=24, captions=True):
    """Writes `count` pictures of shapes, with a caption next to each."""
    folder.mkdir(parents=True)
    for number in range(count):
        color, ground = COLORS[number % 6], COLORS[(number % 6 + 1 + number // 6 % 5) % 6]
        shape = ("ellipse", "rectangle")[number // 6 % 2]
        image = Image.new("RGB", (64, 48), ground)
        getattr(ImageDraw.Draw(image), shape)((8, 8, 40, 40), fill=color)
        image.save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"a {color} {shape} on a {ground} ground\nthe {shape} is {color}")
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn") / "pictures")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "base"
    tokenizer = gpt2_like()
    llama_of(tokenizer, max_position_embeddings=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
