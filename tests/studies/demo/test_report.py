"""The report of given results: numbers, verdicts, swaps, and what is said when MemoryColor is skipped."""

import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="needs the extra [demo]")
from studies.demo.exhibits import Example, Exhibits, Swap
from studies.demo.report import ROW_NAMES, attention, write_report
from studies.demo.things import CREDIT
from tests.valm.explain.explanations import explanation
from valm.evaluation.questions import COLOR_PROMPTS
from valm.explain.images import ShownImage

LOSSES = {name: [3.0, 1.0] for name in ("clip", "gpt2", "model", "control")}
PICTURE = Image.new("RGB", (8, 8), "red")
SHARES = {"valm": 0.871, "gpt2": 0.194, "random_images": 0.106, "blind": 0.74, "majority": 0.266}


def results(memory: bool) -> dict:
    detail = {"interval": [0.1, 0.9], "by_prompt": dict.fromkeys(COLOR_PROMPTS, 0.5)}
    return {
        "heldout_color_accuracy": SHARES,
        "memory_color_accuracy": SHARES if memory else None,
        "memory_color_note": None if memory else "there is no table <here>",
        "hit_rate": {"top1": 0.5, "top4": 0.7, "top8": 0.9},
        "red_blue_swap": {"before": {"red": {"red": 17, "pink": 1}}, "after": {"red": {"blue": 18}}},
        "details": {name: {"heldout": detail, "memory": detail} for name in ROW_NAMES if name != "majority"},
        "things": {"pictured": 9, "colour_said": 5, "heldout": 3, "memory_color": 1},
        "seed": 7,
        "split": "test",
        "settings": {"sentences": 8000},
        "seconds": {"clip": 61.25, "model": 30.5},
        "versions": {"torch": "2.13"},
        "hardware": "a <processor>, 2 cores",
        "command": "python -m studies.demo --seed 7",
    }


def seen(text, answers, **changes):
    """A question that one picture was found for."""
    probabilities = np.array(list(answers.values()), np.float32)
    shown = (ShownImage("a rose", PICTURE),)
    given = {"text": text, "answers": tuple(answers), "probabilities": probabilities, "images": shown}
    index = {"image_index": np.array([[-1, -1], [-1, -1], [0, -1]])}
    return explanation(**given | index | changes)


@pytest.fixture
def exhibits() -> Exhibits:
    rose, whale = "The color of the rose is", "The color of the whale is"
    before, after = {"red": 0.45, "blue": 0.05, "pink": 0.0}, {"red": 0.1, "blue": 0.4, "pink": 0.0001}
    examples = [Example(seen(rose, before), "red"), Example(seen(whale, {"grey": 0.6, "blue": 0.4}), "blue")]
    return Exhibits(examples, [Swap(seen(rose, before), seen(rose, after))])


def test_attention_is_the_mean_of_the_heads():
    first, second, third = attention(explanation())
    assert [row["token"] for row in (first, second, third)] == ["(start)", "the", "bat"]
    assert third["text"] == pytest.approx([0.2, 0.2, 0.6]) and len(second["text"]) == 2  # what comes later is not shown
    assert [image["share"] for image in first["images"]] == pytest.approx([0.2, 0.05])
    assert [image["opacity"] for image in first["images"]] == pytest.approx([1, 0.15 + 0.85 / 4])
    assert [image["title"] for image in second["images"]] == ["no thumbnail", "a red ball"]
    assert third["images"] == []
    (token,) = attention(explanation(tokens=("\u202ex",), text_weights=np.ones((1, 1, 1))))[:1]
    assert token["token"] != "\u202ex"  # it would turn the page around


def test_everything_given_is_shown(tmp_path, exhibits):
    write_report(tmp_path / "report.html", results(memory=True), LOSSES, exhibits)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2  # of losses
    assert text.count("<img") == 5  # of two examples, of a token, and of a swap twice
    assert text.count(CREDIT) == 3 and ">1 objects of MemoryColor<" in text
    assert "87.1%" in text and "19.4%" in text and "26.6%" in text
    assert '<span class="answer right">red</span>' in text
    assert '<span class="answer wrong">grey</span> <span class="soft">(correct: blue)</span>' in text
    assert "--seed 7" in text and "sentences\n8000" in text and "a &lt;processor&gt;, 2 cores" in text
    assert "red 17, pink 1" in text and "blue 18" in text
    assert '<th scope="row">together</th><td>92 s</td>' in text  # 61.25 + 30.5
    assert re.findall(r'class="bar" style="width: ([\d.]+)%', text) == ["67.5", "15.0", "7.5", "60.0"]
    assert '<th scope="row">pink</th>' not in text  # next to never said
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_memory_color_it_says_why_and_hostile_words_are_escaped(tmp_path, exhibits):
    hostile = seen("<script>1</script>", {"<b>": 1.0}, images=(ShownImage('" onerror="1', PICTURE),))
    exhibits.examples.append(Example(hostile, "red"))
    write_report(tmp_path / "report.html", results(memory=False), LOSSES, exhibits)
    text = (tmp_path / "report.html").read_text()
    assert "MemoryColor is skipped: there is no table &lt;here&gt;" in text
    assert ">1 objects of MemoryColor<" not in text
    assert "<script" not in text and ' onerror="' not in text and "&lt;b&gt;" in text


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_a_phone_and_a_desk_show_all_of_it(tmp_path, exhibits, browser, width, scheme):
    weights = {"text_weights": np.tril(np.ones((1, 8, 8))), "image_weights": np.zeros((1, 8, 1))}
    changes = {"tokens": ("word",) * 8, "image_index": np.zeros((8, 1), int)} | weights
    exhibits.examples.insert(0, Example(seen("a long one", {"red": 1.0}, **changes), "red"))
    write_report(tmp_path / "report.html", results(memory=True), LOSSES, exhibits)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing is cut off, nothing scrolls
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 80) == (scheme == "dark")
    ink = page.locator("svg text").evaluate_all("texts => [...new Set(texts.map(text => getComputedStyle(text).fill))]")
    assert ink == ["rgb(228, 231, 235)" if scheme == "dark" else "rgb(35, 39, 46)"]
    says = "element => parseFloat(getComputedStyle(element, '::before').height) > 10"
    assert page.locator(".scroll:has(.attention)").evaluate(says) == (width == 390)
