import json
import re

import pytest
from PIL import Image

from studies.color.report import TABLES, accuracies, by_picture, claims, harm, summary, trainings, write_page
from studies.color.results import read_results
from tests.studies.color.synthetic import PICTURED, RIGHT, result, second_result, without, write
from valm.errors import ValmError

MARK = "<!-- study: {} of synthetic -->\n{}\n<!-- end -->\n"


def second(folder, seeds):
    return read_results(write(folder, seeds, second_result))


def test_a_page_gets_every_table_and_figure_of_its_study(tmp_path):
    page = tmp_path / "study.md"
    other = "<!-- study: state of other -->\nOLD\n<!-- end -->\n"
    page.write_text("# A study\n\n" + "\n".join(MARK.format(name, "UNWRITTEN") for name in TABLES) + other)
    write_page(read_results(write(tmp_path)), page, tmp_path)
    text = page.read_text()
    assert "UNWRITTEN" not in text and other in text
    assert text.count("<!-- end -->") == len(TABLES) + 1
    assert "| VaLM | 88.9" in text
    assert "Interim" in text
    for name in ("forest", "overview", "curves"):
        assert Image.open(tmp_path / f"study-synthetic-{name}.png").size[0] > 400


def test_a_page_without_a_place_for_the_study_is_named(tmp_path):
    page = tmp_path / "study.md"
    page.write_text(MARK.format("nothing", ""))
    with pytest.raises(ValmError, match="a table 'nothing', expected one of state"):
        write_page(read_results(write(tmp_path)), page, tmp_path)
    page.write_text(MARK.format("state", "").replace("synthetic", "other"))
    with pytest.raises(ValmError, match=r"no table of the study synthetic: .* <!-- study: state of synthetic -->"):
        write_page(read_results(write(tmp_path)), page, tmp_path)


def test_a_number_of_fewer_seeds_says_which(tmp_path):
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(without(result(2), "blind")))
    table = accuracies(read_results([*write(tmp_path), fewer]))
    assert re.search(r"\| Blind \| 88\.9 \S+ \S+ \(seeds 0, 1\) \|", table)
    assert "(seeds" not in accuracies(read_results(write(tmp_path)))
    some = result(3)
    some["rows"] = [row for row in some["rows"] if row["arm"] == "blind" or row["of"] == "memory_color"]
    fewer.write_text(json.dumps(some))
    said = summary(read_results([*write(tmp_path), fewer]))
    assert said.startswith("| Points [95 %], seeds 0, 1, 3 of 5 | VaLM − twin | VaLM − Blind |\n")
    assert re.search(r"no text says \| \S+ \S+ \S+ \(seeds 0, 1\) \|", said)
    fewer.write_text(json.dumps(without(some, "valm", "twin")))
    assert "seeds 0, 1 of 5" in summary(read_results([*write(tmp_path), fewer]))
    assert summary(read_results([fewer])) == "No seed has both models yet."


def test_a_difference_whose_interval_has_zero_is_called_not_significant(tmp_path):
    header, _, memory_color, *_ = summary(read_results(write(tmp_path, range(5)))).splitlines()
    assert header.endswith("| VaLM − twin | VaLM − Blind |")
    twin, blind = memory_color.split("|")[2:4]
    assert "not significant" not in twin
    assert blind.strip().endswith("not significant")  # Blind gave the same answers


def test_the_hypotheses_of_the_second_study(tmp_path):
    few, all_seeds = (claims(second(tmp_path, seeds)) for seeds in (range(5, 8), range(5, 10)))
    verdicts = {re.match(r"\| (S\d)", line)[1]: line.rsplit("|", 2)[1].strip() for line in all_seeds.splitlines()[2:]}
    assert verdicts == {
        "S1": "holds",
        "S2": "holds",
        "S3": "does not hold",  # no captions were read
        "S4": "holds",
        "S5": "holds",
        "S7": "holds",
        "S8": "holds",
    }
    assert re.search(r"S1: .* \| so far yes \|", few)
    assert re.search(r"S7: .* \| holds \|", few)  # three seeds are all that the plan has
    assert "prose × the base's 0.58 [0.58, 0.58]; prose × the twin's 0.95" in all_seeds
    s7, without_black = (line.split(" | ")[1:] for line in all_seeds.splitlines() if "S7" in line)
    assert s7 == without_black  # no candidate is black


def test_harm_is_over_the_base_and_over_the_twin(tmp_path):
    results = second(tmp_path, (5, 6))
    rows = {line.split(" | ")[0]: line for line in harm(results).splitlines()}
    assert rows["| VaLM, with the cut"] == "| VaLM, with the cut | 0.58 [0.58, 0.58] | 0.95 [0.95, 0.95] |"
    assert rows["| base"] == "| base | – | 1.65 [1.65, 1.65] |"
    assert summary(results).splitlines()[-1] == (
        "| perplexity with the cut (`min_score`), × the twin's | prose 0.95 [0.95, 0.95] "
        "| × the base's: prose 0.58 [0.58, 0.58] |"
    )
    without_base = read_results(write(tmp_path))
    assert "base" not in harm(without_base) + summary(without_base)


def test_items_with_and_without_a_picture_stand_apart(tmp_path):
    table = by_picture(second(tmp_path, (5, 6)))
    line = next(line for line in table.splitlines() if "VaLM − twin | MemoryColor, raw" in line)
    for some in (PICTURED, ~PICTURED):
        assert f"| 15 | +{100 * (8 / 9 - (RIGHT[some] == 'red').mean()):.1f} [" in line
    assert "validation things" not in table  # all have one


def test_what_was_missing_and_where_trainings_stopped_is_said(tmp_path):
    results = second(tmp_path, (5, 6))
    assert "Not asked, as the machine had no such file: RelativeSize (seeds 5, 6)." in TABLES["state"](results)
    assert "no such file: captions (seeds 5, 6)." in TABLES["state"](results)
    assert "| VaLM | 480, 480 | 0.250, 0.250 | 12.5, 12.5 |" in trainings(results)
