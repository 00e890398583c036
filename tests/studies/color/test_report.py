import json
import re

import pytest
from PIL import Image

from studies.color.report import (
    TABLES,
    accuracies,
    claims,
    harm,
    hypotheses,
    perplexities,
    pictured,
    summary,
    trainings,
    write_page,
)
from studies.color.results import Results, read_results
from studies.color.scoring import expanded
from tests.studies.color.synthetic import result, second_result, write
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


def second(folder, seeds):
    files = []
    for seed in seeds:
        files.append(folder / f"second-{seed}.json")
        files[-1].write_text(json.dumps(second_result(seed)))
    return read_results(files)


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
    assert TABLES["summary"](results).splitlines()[-1] == (
        "| perplexity with the cut (`min_score`), × the twin's | prose 0.95 [0.95, 0.95] "
        "| × the base's: prose 0.58 [0.58, 0.58] |"
    )
    assert TABLES["summary"](read_results(write(tmp_path))) == summary(read_results(write(tmp_path)))


def test_items_with_and_without_a_picture_stand_apart(tmp_path):
    results = second(tmp_path, (5, 6))
    right = expanded(results.seeds[0]["sets"]["memory_color"]["right"])[:, 0]
    with_picture, without = (100 * (8 / 9 - (right[first::2] == 0).mean()) for first in (0, 1))
    line = next(line for line in pictured(results).splitlines() if "VaLM − twin | MemoryColor, raw" in line)
    assert f"| 15 | +{with_picture:.1f} [" in line
    assert f"| 15 | +{without:.1f} [" in line
    assert "validation things" not in pictured(results)  # all have one


def test_what_was_missing_and_where_trainings_stopped_is_said(tmp_path):
    results = second(tmp_path, (5, 6))
    assert "Not asked, as the machine had no such file: RelativeSize (seeds 5, 6)." in TABLES["state"](results)
    assert "no such file: captions (seeds 5, 6)." in TABLES["state"](results)
    assert "| VaLM | 480, 480 | 0.250, 0.250 | 12.5, 12.5 |" in trainings(results)


def test_a_seed_may_lack_the_second_clip():
    seeds = tuple(second_result(seed) for seed in (5, 8))
    seeds[0]["clip"]["colorless R@1"] = 0.25
    assert "| colorless R@1 | 0.250 | – |" in TABLES["clips"](Results(seeds))


def test_a_page_has_tables_of_two_studies(tmp_path):
    page = tmp_path / "study.md"
    page.write_text("<!-- study: state -->\nOLD\n<!-- end -->\n<!-- study: state of synthetic -->\nNEW\n<!-- end -->\n")
    write_page(read_results(write(tmp_path)), page, tmp_path)
    assert "OLD" in page.read_text()
    assert "NEW" not in page.read_text()
    assert (tmp_path / "study-synthetic-forest.png").is_file()
