"""The tables of the report; how they are asked for is tested with the command."""

import html

import pytest

from valm.evaluation.report import MISSING, markdown, page, tables, write_report
from valm.evaluation.sets import SETS


def estimate(value):
    return {"value": value, "low": value / 2, "high": value}


def row(model, task, protocol, **metrics):
    baselines = {"majority": 0.25, "majority_answer": "white", "chance": 0.1, "constants": {"white": 0.25}}
    return {
        "model": model, "kind": "a model", "checkpoints": 1, "task": task, "protocol": protocol, "items": 4,
        "prompts": 2, "metrics": {"baselines": baselines} | metrics,
    }  # fmt: skip


def results(model="ours", **more):
    about = [
        {"task": name, "title": SETS[name].title, "group": "", "table": SETS[name].table, "note": "", "protocols": []}
        for name in ("memory_color", "lambada", "relative_size", "wikitext103")
    ]
    about[0]["note"] = "a <note>"
    lambada = {"perplexity": estimate(40.5), "accuracy": estimate(0.4), "target_perplexity": estimate(9.0)}
    return {
        "rows": [
            row(model, "memory_color", "published", accuracy=estimate(0.5), balanced=0.4),
            row(model, "lambada", "published", **lambada),
            {**row(model, "relative_size", "published"), "not_applicable": "'yes' is 2 tokens"},
        ],
        "pairs": [],
        "tasks": about,
        "conditions": {"valm": "1", "torch": "2", "transformers": "5", "python": "3", "limit": None},
    } | more


def test_ours_stands_below_the_published_rows():
    table2, table5, details = tables(results())
    # the tasks that were asked: ours has no number for the second, the others are not shown
    assert table2.columns == ("model", "MemoryColor, 4 items", "RelativeSize, 4 items")
    assert table2.rows[0] == ("GPT-2* (paper)", "44.14", "47.22")
    assert table2.rows[8] == ("ours", "50.0 [25.0, 50.0]", MISSING)
    assert table2.rows[-1] == ("always the commonest answer", "25.00", MISSING)
    assert table2.groups == ("published",) * 8 + ("ours", "baseline")
    assert table5.columns == ("model", "LAMBADA, 4 items: perplexity", "LAMBADA, 4 items: accuracy")
    assert table5.rows[0] == ("GPT-2* (paper)", "42.46", "42.17")
    assert table5.rows[-1] == ("ours", "40.5 [20.25, 40.5]", "40.0 [20.0, 40.0]")
    assert details.rows[0][:5] == ("ours", "MemoryColor", "published", "4 × 2", "50.0 [25.0, 50.0]")


def test_numbers_of_a_part_of_the_items_are_marked():
    pair = {"first": "ours", "second": "theirs", "task": "memory_color", "protocol": "fair", "metric": "accuracy"}
    pair |= {"value": 0.1, "low": 0.0, "high": 0.2, "p": 0.5}
    limited = results(pairs=[pair])
    limited["conditions"]["limit"] = 50
    found = tables(limited)
    assert len(found) == 4 and all("50 items of each set at most" in table.note for table in found)
    for table in found:  # the paper's numbers are of all items
        assert all(row[0].endswith("(50 items at most)") for row in table.rows) and "published" not in table.groups
    assert "at most" not in markdown(results(pairs=[pair]))
    assert "Wang et al." in page(results()) and "Wang et al." not in page(limited)


def test_a_second_report_keeps_the_first(tmp_path):
    page, earlier = write_report(results(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert page.name in before and earlier is None
    assert write_report(results(), tmp_path) == (page, None)  # the same numbers
    for number in (1, 2):
        page, earlier = write_report(results(f"model {number}"), tmp_path)
        assert earlier == tmp_path / f"earlier-{number}"
        assert f"model {number}" in page.read_text()
    assert {file.name: file.read_bytes() for file in (tmp_path / "earlier-1").iterdir()} == before
    assert "model 1" in (tmp_path / "earlier-2" / "report.html").read_text()
    (tmp_path / "results.json").write_text("{")
    assert write_report(results(), tmp_path)[1] == tmp_path / "earlier-3"


def test_names_are_escaped():
    wrong = "<script>alert(1)</script>|x"
    shown = page(results(wrong))
    assert "<script" not in shown and f">{html.escape(wrong)}<" in shown
    assert ">MemoryColor: a &lt;note&gt;.<" in shown
    text = markdown(results(wrong))
    assert "<script" not in text and "|x" not in text.replace("\\|x", "")


def test_what_has_no_number_has_a_reason():
    assert "ours has no number for RelativeSize: 'yes' is 2 tokens." in markdown(results())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(browser, tmp_path, width, scheme):
    """Nothing is wider than the screen, nothing is asked of the network, and the colours follow the scheme."""
    long = results("a model with a long name")
    second = row("another model", "memory_color", "published", accuracy=estimate(0.5))
    about = {"first": "x", "second": "another model", "task": "memory_color", "protocol": "published"}
    long["pairs"] = [about | {"metric": "accuracy", "value": 0.2, "low": -0.1, "high": 0.3, "p": 0.5}]
    words = estimate(40.0)
    long["rows"] += [second, row("ours", "wikitext103", "fair", word_perplexity=words, perplexity=words)]
    diverged = {"value": 755300.0, "low": 512300.0, "high": 1123000.0}
    long["rows"].append(row("another model", "wikitext103", "fair", word_perplexity=diverged, perplexity=words))
    wide = {"metric": "nats per byte", "value": -0.011, "low": -0.222, "high": -0.001, "p": 0.5}
    long["pairs"].append(about | wide | {"task": "wikitext103", "protocol": "fair"})
    (tmp_path / "page.html").write_text(page(long))
    shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests = []
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto((tmp_path / "page.html").as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    # equal lengths are equal numbers, also in a chart without differences
    places = "plots => plots.map(plot => plot.getBoundingClientRect()).map(box => [box.left, box.width].join())"
    assert len({*shown.locator("td:not(.difference) > .plot").evaluate_all(places)}) == 1
    sizes = "texts => texts.map(text => parseFloat(getComputedStyle(text).fontSize))"
    assert min(shown.locator("section :is(th, td, span, p)").evaluate_all(sizes)) >= 12
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 28)") == (scheme == "dark")
    scrolls = "tables => tables.map(table => table.scrollWidth > table.clientWidth)"
    says = "tables => tables.map(table => parseFloat(getComputedStyle(table, '::before').height) > 10)"
    tables = shown.get_by_role("region")
    assert tables.evaluate_all(scrolls) == tables.evaluate_all(says) and True in tables.evaluate_all(says)
    table = shown.get_by_role("region", name="Every number")
    first = table.locator("tbody th").first
    before = first.bounding_box()
    table.evaluate("element => element.scrollLeft = 200")
    assert first.bounding_box() == before  # the first column stays
    plots = shown.locator("tr", has_text="another model").first.locator(".plot")
    boxes = [(plots.nth(n).bounding_box(), plots.nth(n).locator(".point").bounding_box()) for n in range(2)]
    shares = [(point["x"] + 4 - plot["x"]) / plot["width"] for plot, point in boxes]
    assert shares == [pytest.approx(0.5 / 0.5, abs=0.02), pytest.approx(0.3 / 0.4, abs=0.02)]
    assert len(requests) == 1
    shown.close()
