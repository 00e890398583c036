"""The report of given results: numbers, verdicts, swaps, and what is said when MemoryColor is skipped."""

import re

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="needs the extra [demo]")
from studies.demo.exhibits import Example, Exhibits, Swap
from studies.demo.report import ROW_NAMES, write_report
from studies.demo.things import CREDIT
from tests.valm.explain.explanations import explanation
from valm.evaluation.questions import COLOR_PROMPTS

PICTURE = Image.new("RGB", (8, 8), "red")
SHARES = {"valm": 0.871, "gpt2": 0.194, "random_images": 0.106, "valm_state_queries": 0.851, "majority": 0.266}


def results(memory: bool) -> dict:
    detail = {"interval": [0.1, 0.9], "by_prompt": dict.fromkeys(COLOR_PROMPTS, 0.5)}
    return {
        "heldout_color_accuracy": SHARES,
        "memory_color_accuracy": SHARES if memory else None,
        "memory_color_note": None if memory else "there is no table <here>",
        "hit_rate": {query: {"top1": 0.5, "top4": 0.7, "top8": 0.9} for query in ("eot", "state")},
        "red_blue_swap": {"before": {"red": {"red": 17, "pink": 1}}, "after": {"red": {"blue": 18}}},
        "details": {name: {"heldout": detail, "memory": detail} for name in ROW_NAMES if name != "majority"},
        "things": {"pictured": 9, "colour_said": 5, "heldout": 3, "memory_color": 1},
        "seed": 7,
        "split": "test",
        "settings": {"sentences": 8000},
        "seconds": {"CLIP": 61.25, "VaLM": 30.5},
        "versions": {"torch": "2.13"},
        "hardware": "a <processor>, 2 cores",
        "command": "python -m studies.demo --seed 7",
    }


@pytest.fixture
def exhibits() -> Exhibits:
    bars = {"as they are": {"red": 0.9, "blue": 0.1}, "red and blue swapped": {"red": 0.2, "blue": 0.8}}
    return Exhibits(
        [
            Example("The color of the rose is", [PICTURE], ["rose"], "red", "red"),
            Example("The color of the whale is", [PICTURE], ["whale"], "grey", "blue"),
        ],
        explanation(),
        [Swap("The color of the rose is", {name: [PICTURE] for name in bars}, bars)],
    )


def test_everything_given_is_shown(tmp_path, exhibits):
    write_report(tmp_path / "report.html", results(memory=True), {"CLIP": [2.0, 1.0], "VaLM": [3.0, 1.0]}, exhibits)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 4  # attention, bars, two of losses
    assert text.count("<img") == 4
    assert text.count(CREDIT) == 3
    assert "87.1%" in text and "19.4%" in text and "26.6%" in text
    assert '<span class="answer right">red</span>' in text
    assert '<span class="answer wrong">grey</span> <span class="soft">(it is blue)</span>' in text
    assert (
        "python -m studies.demo --seed 7" in text
        and "sentences\n8000" in text
        and "a &lt;processor&gt;, 2 cores" in text
    )
    assert "red 17, pink 1" in text and "blue 18" in text
    assert '<th scope="row">together</th><td>91.8</td>' in text  # 61.25 + 30.5
    assert "Seed 7" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_phone_and_a_desk_show_all_of_it(tmp_path, exhibits, browser, width, scheme):
    write_report(tmp_path / "report.html", results(memory=True), {"CLIP": [2.0, 1.0], "VaLM": [3.0, 1.0]}, exhibits)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing is cut off, nothing scrolls
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 80) == (scheme == "dark")
    ink = page.locator("svg text").evaluate_all("texts => [...new Set(texts.map(text => getComputedStyle(text).fill))]")
    assert ink == ["rgb(228, 231, 235)" if scheme == "dark" else "rgb(35, 39, 46)"]
    says = "element => parseFloat(getComputedStyle(element, '::before').height) > 10"
    assert page.locator(".paper.wide").evaluate(says) == (width == 390)
    context.close()


def test_without_memory_color_it_says_why(tmp_path, exhibits):
    write_report(tmp_path / "report.html", results(memory=False), {"CLIP": [1.0], "VaLM": [1.0]}, exhibits)
    text = (tmp_path / "report.html").read_text()
    assert "MemoryColor is skipped: there is no table &lt;here&gt;" in text
    assert "things of MemoryColor" not in text


def test_hostile_words_are_escaped(tmp_path, exhibits):
    exhibits.examples.append(Example("<script>1</script>", [PICTURE], ['" onerror="1'], "<b>", "red"))
    write_report(tmp_path / "report.html", results(memory=False), {"CLIP": [1.0], "VaLM": [1.0]}, exhibits)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and ' onerror="' not in text and "&lt;b&gt;" in text
