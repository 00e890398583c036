import math

import pytest

from valm.evaluation.charts import DIFFERENCES, METRICS, axes, charts


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high}


def row(model, task="memory_color", protocol="fair", **metrics):
    return {"model": model, "task": task, "protocol": protocol, "items": 109, "metrics": metrics}


def pair(second, task="memory_color", metric="accuracy", **numbers):
    return {"first": "valm", "second": second, "task": task, "protocol": "fair", "metric": metric, **numbers}


def results():
    baselines = {"majority": 0.25, "constants": {"white": 0.25}}
    return {
        "rows": [
            row("valm", accuracy=estimate(0.5, 0.4, 0.62), baselines=baselines),
            row("gpt2", accuracy=estimate(0.125, 0.1, 0.2), baselines=baselines),
            row("valm", "wikitext103", perplexity=estimate(30, 29, 31), word_perplexity=estimate(40, 38, 44)),
            row("gpt2", "wikitext103", perplexity=estimate(30, 29, 31), word_perplexity=estimate(41, 39, 45)),
            {"model": "valm", "task": "sst2", "protocol": "fair", "items": 9, "not_applicable": "no tokens"},
        ],
        "pairs": [
            pair("gpt2", **estimate(0.375, 0.3, 0.45)),
            pair("gpt2", metric="calibrated by mean", **estimate(0.2, 0.1, 0.3)),
            pair("gpt2", "wikitext103", "nats per byte", **estimate(-0.01, -0.02, 0.005)),
        ],
    }


def test_a_chart_has_every_model_and_its_difference_to_the_first():
    colors, words = charts(results())
    assert (colors.task, colors.protocol, colors.items, colors.majority) == ("memory_color", "fair", 109, 25.0)
    (valm, own, none), (gpt2, other, difference) = colors.rows
    assert (valm, gpt2, colors.first, none) == ("valm", "gpt2", "valm", None)
    assert (colors.quantity.scaled(own), colors.quantity.scaled(other)[1]) == ([50.0, 40.0, 62.0], 10.0)
    assert colors.difference.scaled(difference)[0] == 37.5
    assert colors.quantity.text(own) == "50.0 [40.0, 62.0]"
    assert colors.difference.text(difference) == "+37.5 [+30.0, +45.0]"
    assert words.quantity is METRICS["word_perplexity"] and words.majority is None
    assert words.difference.text(words.rows[1][2]) == "-0.010 [-0.020, +0.005]"


def test_one_model_has_no_difference():
    first = results()
    first["rows"], first["pairs"] = first["rows"][:1], []
    (chart,) = charts(first)
    assert chart.difference is None and [difference for _, _, difference in chart.rows] == [None]
    assert list(axes([chart])) == [METRICS["accuracy"]]


def test_a_quantity_has_one_axis_with_all_its_numbers():
    found = axes(charts(results()))
    accuracy, perplexity = found[METRICS["accuracy"]], found[METRICS["word_perplexity"]]
    assert (accuracy.start, accuracy.end, accuracy.place(35)) == (0, 70, 50)
    assert (perplexity.start, perplexity.end) == (38, 45)  # which need not begin at 0
    nats = found[DIFFERENCES["nats per byte"]]
    assert (nats.start, nats.end) == pytest.approx((-0.02, 0.01)) and nats.place(0) == pytest.approx(200 / 3)


def test_equal_numbers_have_an_axis_too():
    same = results()
    same["pairs"] = [pair("gpt2", **estimate(0.0, 0.0, 0.0))]
    axis = axes(charts(same))[DIFFERENCES["accuracy"]]
    assert (axis.start, axis.end, axis.place(0)) == (0, 1, 0)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_perplexity_that_is_not_finite_has_a_place(wrong):
    made = results()
    made["rows"][3]["metrics"] |= {"word_perplexity": estimate(wrong, 39, wrong)}
    words = charts(made)[1]
    axis = axes([words])[words.quantity]
    assert (axis.start, axis.end) == (38, 44)
    assert 0 <= axis.place(wrong) <= 100 and axis.place(41) == 50
    made["rows"][2]["metrics"] |= {"word_perplexity": estimate(wrong, wrong, wrong)}
    made["rows"][3]["metrics"] |= {"word_perplexity": estimate(wrong, wrong, wrong)}
    words = charts(made)[1]
    assert 0 <= axes([words])[words.quantity].place(wrong) <= 100
