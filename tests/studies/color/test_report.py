import json
import re

import pytest
from PIL import Image

from studies.color.report import TABLES, accuracies, hypotheses, perplexities, summary, write_page
from studies.color.results import read_results
from tests.studies.color.synthetic import result, write
from valm.errors import ValmError


def test_a_page_gets_every_table_and_figure(tmp_path):
    page = tmp_path / "study.md"
    page.write_text(
        "# A study\n\n" + "\n\n".join(f"<!-- study: {name} -->\nUNWRITTEN\n<!-- end -->" for name in TABLES)
    )
    results = read_results(write(tmp_path))
    write_page(results, page, tmp_path)
    text = page.read_text()
    assert "UNWRITTEN" not in text
    assert text.count("<!-- end -->") == len(TABLES)
    assert "| VaLM | 88.9" in text
    assert "Interim" in text
    assert "| glosses dropped | 12 | 12 |" in text
    for name in ("forest", "overview", "curves"):
        assert Image.open(tmp_path / f"study-{name}.png").size[0] > 400
    write_page(results, page, tmp_path)
    assert page.read_text() == text  # the same numbers, however often


def test_nothing_is_decided_before_all_seeds_are_there(tmp_path):
    two = hypotheses(read_results(write(tmp_path)))
    five = hypotheses(read_results(write(tmp_path, range(5))))
    assert "so far yes" in two
    assert "holds" not in two
    assert re.search(r"H1: .* \| holds \|", five)
    assert re.search(r"H4: .*0\.0.* \| does not hold \|", five)  # Blind gave the same answers


def test_a_number_of_fewer_seeds_says_which(tmp_path):
    fewer = result(2)
    fewer["rows"] = [row for row in fewer["rows"] if row["arm"] != "blind"]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    results = read_results([*write(tmp_path), tmp_path / "fewer.json"])
    assert re.search(r"H4: .*so far no \(seeds 0, 1\) \|", hypotheses(results))
    assert re.search(r"\| Blind \| 88\.9 \S+ \S+ \(seeds 0, 1\) \|", accuracies(results))
    assert "(seeds" not in accuracies(read_results(write(tmp_path)))
    without = result(3)
    without["rows"] = [row for row in without["rows"] if row["arm"] == "blind" or row.get("set") == "memory_color"]
    (tmp_path / "without.json").write_text(json.dumps(without))
    said = summary(read_results([*write(tmp_path), tmp_path / "without.json"]))
    assert said.startswith("| Points [95 %], seeds 0, 1, 3 of 5 | VaLM − twin | VaLM − Blind |\n")
    assert re.search(r"no text says \| \S+ \S+ \S+ \(seeds 0, 1\) \|", said)
    without["rows"] = [row for row in without["rows"] if row["arm"] == "blind"]
    (tmp_path / "without.json").write_text(json.dumps(without))
    assert "seeds 0, 1 of 5" in summary(read_results([*write(tmp_path), tmp_path / "without.json"]))
    assert summary(read_results([tmp_path / "without.json"])) == "No seed has both models yet."


def test_a_difference_whose_interval_has_zero_is_called_not_significant(tmp_path):
    header, _, memory_color, *_ = summary(read_results(write(tmp_path, range(5)))).splitlines()
    assert header.endswith("| VaLM − twin | VaLM − Blind |")
    twin, blind = memory_color.split("|")[2:4]
    assert "not significant" not in twin
    assert blind.strip().endswith("not significant")  # Blind gave the same answers


def test_captions_that_were_not_read_are_a_line(tmp_path):
    line = "No captions of Flickr8k were read: VALM_EVAL_DATA names no folder that has flickr8k_1000/captions.txt."
    assert perplexities(read_results(write(tmp_path))).endswith(f"|\n\n{line}")
    found = result(0)
    found["rows"] += [row | {"text": "captions"} for row in found["rows"] if "text" in row]
    (tmp_path / "whole.json").write_text(json.dumps(found))
    assert line not in perplexities(read_results([tmp_path / "whole.json"]))


def test_a_mark_of_no_table_is_named(tmp_path):
    page = tmp_path / "study.md"
    page.write_text("<!-- study: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValmError, match="nothing"):
        write_page(read_results(write(tmp_path)), page, tmp_path)


def test_perplexity_is_compared_to_the_twin_of_the_same_corpus(tmp_path):
    found = result(0)
    for arm, images, nats in (("natural-twin", "none", 2.0), ("natural-valm", "retrieved", 2.0)):
        found["rows"].append({"arm": arm, "images": images, "text": "prose", "nats": [nats, nats], "tokens": [2, 4]})
    (tmp_path / "natural.json").write_text(json.dumps(found))
    table = perplexities(read_results([tmp_path / "natural.json"]))
    assert "| natural twin | 1.9 |" in table
    assert "| natural VaLM | 1.9, 1.00 [1.00, 1.00] |" in table
