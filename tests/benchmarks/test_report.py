"""No measured figure of the pages is typed by hand: they are what the results say."""

import pytest

from benchmarks import gpu_report, report

PAGES = report.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_show_what_was_measured(path):
    assert path.read_text(encoding="utf-8") == PAGES[path], "run python -m benchmarks.report"


def test_each_table_has_a_place():
    marks = [mark[2] for path in PAGES for mark in gpu_report.MARK.finditer(path.read_text(encoding="utf-8"))]
    assert set(marks) == set(report.MARKED)


def test_every_file_of_results_is_listed():
    assert {path.name for path in report.RESULTS.glob("*.csv")} - {gpu_report.RESULTS.name} == set(report.TITLES)


def test_a_result_replaces_what_was_typed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- topk: python -m benchmarks.report -->\ntyped by hand\n<!-- end -->\nb\n")
    monkeypatch.setattr(report, "TOPK", page)
    written = report.pages()[page]
    assert "typed by hand" not in written and written.endswith("<!-- end -->\nb\n")
    assert report.topk_table() in written


def test_the_plot_of_attention_has_every_case():
    (axes,) = report.attention_figure().axes
    cases = {row["group"] for row in report.read(report.RESULTS / report.XEON)}
    assert {label.get_text() for label in axes.get_yticklabels()} == set(filter(report.ATTENTION.match, cases))
