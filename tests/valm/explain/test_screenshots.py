"""The screenshots of the docs, taken of the demo's model in a real browser.

With VALM_DEMO naming a folder that `python -m studies.demo` wrote; VALM_SCREENSHOTS=docs/images writes them there.
"""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.valm.serving.test_api import running
from valm.evaluation.controls import images_for
from valm.explain.explanation import Reader, explain_together
from valm.explain.page import write_page
from valm.model.checkpoint import load

PROMPT = "the most common color of tomato is"
COLORS = 256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo():
    folder = os.environ.get("VALM_DEMO")
    if folder is None:
        pytest.skip("needs VALM_DEMO, a folder that `python -m studies.demo` wrote")
    return Path(folder)


@pytest.fixture
def save(tmp_path):
    """Writes what a page shows, of its top `height` pixels, as a small PNG."""
    folder = Path(os.environ.get("VALM_SCREENSHOTS", tmp_path))

    def write(page, name, width, height):
        clip = {"x": 0, "y": 0, "width": width, "height": height}
        image = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")
        assert image.size == (width, height) and len(image.getcolors(width * height)) > 100  # not blank
        image.quantize(COLORS, kmeans=2, dither=Image.Dither.NONE).save(folder / name, optimize=True)

    return write


def test_screenshot_of_the_page(demo, browser, save, tmp_path):
    model, tokenizer = load(demo / "valm")
    replaced = Reader(model, tokenizer, images_for(model, replace=demo / "pictures" / "frog"))
    readers = {"valm": Reader(model, tokenizer), "valm, with images of frog": replaced}
    write_page(tmp_path / "page.html", explain_together(readers, PROMPT))
    page = browser.new_page(viewport={"width": 1080, "height": 700}, color_scheme="light")
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator(".best th").all_inner_texts() == ["red", "green"]
    save(page, "explain-replace.png", 1080, 730)
    page.close()


def test_screenshots_of_the_served_page(demo, browser, save):
    from playwright.sync_api import expect

    with running(*load(demo / "valm"), name="valm", other=("gpt2", *load(demo / "gpt2"))) as server:
        for width, height, scheme, name in ((1280, 800, "light", "page.png"), (390, 1400, "dark", "page-phone.png")):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(f"http://127.0.0.1:{server.port}/")
            page.get_by_role("button", name="2. Other images").click()
            titles = page.locator("#explanation .setting h2")
            expect(titles).to_have_text(["valm, 4 retrieved images", "valm, 4 random images", "gpt2"], timeout=60_000)
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)  # the button's and the progress bar's transitions
            save(page, name, width, height)
            page.close()
