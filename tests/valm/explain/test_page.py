import itertools
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.valm.explain.explanations import IMAGES, TEXT, explanation
from valm.explain.images import ShownImage
from valm.explain.page import heads, render_body, render_page, write_page

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)></bdi></style>&amp;{{ 7 * 7 }}"


class Elements(HTMLParser):
    """The elements of a page with their attributes and the text in each."""

    VOID = ("meta", "img", "col")

    def __init__(self, page):
        super().__init__()
        self.all, self.open = [], []
        self.feed(page)
        assert self.open == []  # each one is closed, in order

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes), []))
        if tag not in self.VOID:
            self.open.append(self.all[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def of(self, tag, **attributes):
        wanted = attributes.items()
        return [element for element in self.all if element[0] == tag and wanted <= element[1].items()]

    def texts(self, tag, **attributes):
        return [" ".join("".join(texts).split()) for _, _, texts in self.of(tag, **attributes)]


def hostile():
    images = (ShownImage(HOSTILE, Image.new("RGB", (8, 8))), ShownImage(HOSTILE, None))
    words = {"text": HOSTILE, "tokens": (HOSTILE,) * 3, "answers": (HOSTILE, "blue"), "images": images}
    return {HOSTILE: explanation(**words), "other": explanation(note=HOSTILE)}


def test_every_number_is_on_the_page():
    page = Elements(render_page({"valm": explanation()}))
    assert page.texts("h1") == ["the bat …"]
    rows = [text.split() for text in page.texts("tr")]
    assert ["red", "70.0%"] in rows and ["blue", "20.0%"] in rows and ["anything", "else", "10.0%"] in rows
    assert [text.split()[0] for text in page.texts("tr", **{"class": "best"})] == ["red"]
    # means of the two heads
    attention = [["(start)", "75", "25"], ["the", "13", "63", "25"], ["bat", "20", "20", "60", "0"]]
    assert all(row in rows for row in attention)
    assert page.texts("b", **{"data-weight": "3"}) == ["20%"] and page.texts("b", **{"data-share": "1"}) == ["25%"]
    assert [image["alt"] for _, image, _ in page.of("img")] == ["a red ball", "a red ball"]
    assert "No image was found here." in page.texts("p")


def test_the_script_gets_all_heads():
    page = Elements(render_page({"valm": explanation()}))
    (heads,) = json.loads(page.texts("script", type="application/json")[0])
    weights = np.array(heads["weights"]).reshape(3, 3, 5) * 1e-4  # the mean, head 0, head 1
    assert heads["tokens"] == 3
    np.testing.assert_allclose(weights[1], np.concatenate([TEXT, IMAGES], 1), atol=1e-4)
    np.testing.assert_allclose(weights[2], np.eye(3, 5), atol=1e-4)
    np.testing.assert_allclose(weights[0], (weights[1] + weights[2]) / 2, atol=1e-4)


def test_models_have_one_scale():
    """Equal weights look the same, whatever else a model looks at."""
    whole = explanation()
    half = explanation(text_weights=whole.text_weights / 2, image_weights=whole.image_weights / 2)

    def bars(shown, name):
        elements = [element for _, element, _ in Elements(render_body(shown)).all if name in element]
        return [float(element["style"].removeprefix("--bar: ")) for element in elements]

    cells = bars({"whole": whole, "half": half}, "data-cell")
    np.testing.assert_allclose(cells[: len(cells) // 2], 2 * np.array(cells[len(cells) // 2 :]), atol=1e-4)
    alone, both = (bars(shown, "data-bar") for shown in ({"half": half}, {"whole": whole, "half": half}))
    np.testing.assert_allclose(np.array(both[len(alone) :]) * 2, both[: len(alone)], atol=1e-4)
    np.testing.assert_allclose(alone, both[: len(alone)], atol=1e-4)
    assert heads({"whole": whole, "half": half})[1]["largest"] == heads({"whole": whole})[0]["largest"]
    assert "A whole bar below an image is 40% of the attention, here" in render_body({"whole": whole, "half": half})


def test_everything_hostile_is_text():
    page = Elements(render_page(hostile()))
    assert len(page.of("script")) == 2  # the page's own: data and code
    assert not any(name.startswith("on") for _, attributes, _ in page.all for name in attributes)
    assert page.texts("h1") == [" ".join(f"{HOSTILE} …".split())]
    assert [image["src"][:16] for _, image, _ in page.of("img")] == ["data:image/jpeg;"] * 4
    assert {image["alt"] for _, image, _ in page.of("img")} == {HOSTILE, "a red ball"}
    assert "49" not in " ".join(page.texts("h1"))


def test_the_page_asks_for_nothing_outside():
    page = Elements(render_page(hostile()))
    addresses = [of[name] for _, of, _ in page.all for name in ("src", "href") if name in of]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in "".join(page.texts("style")) and "@import" not in "".join(page.texts("style"))
    (policy,) = [meta["content"] for _, meta, _ in page.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none';") and "unsafe-eval" not in policy


def test_a_screen_reader_finds_its_way():
    page = Elements(render_page({"valm": explanation(), "gpt2": explanation()}))
    assert page.of("html")[0][1]["lang"] == "en" and len(page.of("main")) == 1
    assert all("alt" in image for _, image, _ in page.of("img"))
    assert all(header["scope"] in ("row", "col") for _, header, _ in page.of("th"))
    named = {element["id"] for _, element, _ in page.all if "id" in element}
    assert {element["aria-labelledby"] for _, element, _ in page.all if "aria-labelledby" in element} <= named
    assert all(region["tabindex"] == "0" for _, region, _ in page.of("div", role="region"))
    levels = [int(tag[1]) for tag, _, _ in page.all if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_model_without_images_says_so():
    note = "This model takes no images (K = 0)."
    none = {"image_weights": np.zeros((2, 3, 0)), "image_index": np.zeros((3, 0), int), "images": (), "note": note}
    page = Elements(render_page({"gpt2": explanation(**none, scores=np.zeros((3, 0)))}))
    assert note in page.texts("p") and page.of("img") == [] and "Images" not in page.texts("h3")


def test_a_model_that_says_no_word_says_something_else():
    page = Elements(render_page({"valm": explanation(answers=(), probabilities=np.zeros(0))}))
    assert ["anything", "else", "100.0%"] in [text.split() for text in page.texts("tr")]


def test_a_small_probability_is_not_zero():
    small = explanation(probabilities=np.array([0.9997, 0.0003], np.float32))
    none = explanation(probabilities=np.array([1, 0], np.float32))
    rows, without = ([text.split() for text in Elements(render_page({"valm": of})).texts("tr")] for of in (small, none))
    assert ["red", "100.0%"] in rows and ["blue", "<0.1%"] in rows
    assert ["blue", "0.0%"] in without and ["anything", "else", "0.0%"] in without


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_in_a_browser(browser, tmp_path, width, scheme):
    write_page(tmp_path / "page.html", hostile())
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url[:9]))
    page.on("console", lambda message: messages.append(message.text))
    page.on("dialog", lambda dialog: messages.append(dialog.message))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing is cut off, nothing scrolls
    section = page.locator("[data-setting='1']")
    numbers = section.locator(".attention tbody tr").nth(2)
    bar = "element => Number(element.style.getPropertyValue('--bar'))"
    assert numbers.inner_text().split() == ["bat", "20", "20", "60", "0"]
    section.locator("select").select_option("1")
    assert numbers.inner_text().split() == ["bat", "40", "40", "20", "0"]
    assert section.locator("[data-share='0']").inner_text() == "50%"
    assert section.locator("[data-bar='3']").evaluate(bar) == 1
    assert section.locator("[data-cell='0']").evaluate(bar) == 0.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 27)") == (scheme == "dark")
    assert messages == [] and set(requests) <= {"file:///t", "data:imag"}


@pytest.mark.slow
@pytest.mark.parametrize("tokens, scrolls", [(3, False), (20, True)])
def test_a_wide_table_says_that_it_scrolls(browser, tmp_path, tokens, scrolls):
    weights, none = np.zeros((2, tokens, tokens), np.float32), np.full((tokens, 2), -1)
    long = explanation(
        tokens=("word",) * tokens,
        text_weights=weights,
        image_weights=weights[:, :, :2],
        image_index=none,
        scores=none.astype(float),
    )
    write_page(tmp_path / "page.html", {"valm": long})
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((tmp_path / "page.html").as_uri())
    table = page.locator(".scroll")
    assert table.evaluate("element => element.scrollWidth > element.clientWidth") == scrolls
    assert (table.evaluate("element => parseFloat(getComputedStyle(element, '::before').height)") > 10) == scrolls
    before = table.locator("th[scope=row]").first.bounding_box()
    table.evaluate("element => element.scrollLeft = 200")
    assert table.locator("th[scope=row]").first.bounding_box() == before  # the first column stays
