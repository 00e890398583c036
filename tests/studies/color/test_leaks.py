"""Held-out paragraphs that published seeds were trained on are listed, and the report leaves them out."""

import json
import platform

import pytest

from studies.color import leaks
from studies.color.leaks import FILE, PYTHON, RECIPES, SEEDS, leaked, split, without_leaks
from studies.color.report import write_page
from studies.color.results import Results, read_results
from tests.studies.color.synthetic import result
from valm.errors import ValmError

TEXT = ("twin", "none", "prose")


def published(seed):
    """Results of 33 paragraphs, of which the leaked ones have 9 nats a token and the others 1."""
    places = json.loads(FILE.read_text())["prose"][str(seed)]
    nats = [9.0 if place in places else 1.0 for place in range(33)]
    rows = [row | ({"nats": nats, "tokens": [1] * 33} if "text" in row else {}) for row in result(seed)["rows"]]
    return result(seed) | {"recipe": RECIPES[2], "rows": rows}


def test_the_list_is_that_of_the_split():
    known = json.loads(FILE.read_text())
    assert (known["recipes"], known["python"], list(known["prose"])) == ([*RECIPES], PYTHON, [*map(str, SEEDS)])
    if platform.python_version() != PYTHON:
        pytest.skip(f"the published seeds read the documentation of Python {PYTHON}")
    for seed in SEEDS:
        assert known["prose"][str(seed)] == leaked(seed)
    trained, held = split(0)
    assert [text in trained for text in held].count(True) == 6
    assert (len(trained), len(held)) == (260, 33)


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(leaks.platform, "python_version", lambda: "3.10.1")
    with pytest.raises(ValmError, match=r"not 3\.10\.1"):
        split(0)


def test_leaked_paragraphs_are_left_out_of_published_recipes_alone():
    whole = Results((published(0), published(5)))
    clean = without_leaks(whole)
    assert whole.perplexity(*TEXT).value > clean.perplexity(*TEXT).value == pytest.approx(2.71828, rel=1e-5)
    assert [len(row["tokens"]) for seed in clean.seeds for row in seed["rows"] if "text" in row] == [27, 27, 18, 18]
    assert whole.seeds[0] == published(0)  # left as it was
    others = Results((published(0) | {"recipe": "abc"}, published(0) | {"seed": 10}))
    assert without_leaks(others) == others


def test_the_page_leaves_them_out_and_says_so(tmp_path):
    files = [tmp_path / f"{seed}.json" for seed in (0, 5)]
    for file, seed in zip(files, (0, 5), strict=True):
        file.write_text(json.dumps(published(seed)))
    page = tmp_path / "study.md"
    page.write_text("".join(f"<!-- study: {name} -->\n<!-- end -->\n" for name in ("state", "perplexities")))
    write_page(read_results(files), page, tmp_path)
    assert "Prose is read without the 6, 15 of 33 paragraphs that stand in the training text too." in page.read_text()
    assert "| twin | 2.7 |" in page.read_text()
