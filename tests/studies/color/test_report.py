import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studies.color.comparisons import (
    BASE,
    BLIND,
    CUT,
    PRIMARY,
    READING,
    READING_BLIND,
    READING_BLIND_ALL,
    points,
)
from studies.color.config import COLORED_CAPTIONS
from studies.color.hypotheses import best, holm, hypotheses
from studies.color.report import TABLES, answers, exchanged, secondary, write_figure, write_pages
from studies.color.results import CALIBRATED, PEOPLE, pictured, read_results
from tests.studies.color.synthetic import PICTURED, RIGHT, fourth, result, without, write
from valm.errors import ValmError
from valm.evaluation import statistics

ROOT = Path(__file__).parents[3]
MARK = "<!-- study: {} of synthetic -->\n{}\n<!-- end -->\n"
RED = RIGHT == "red"


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 4 * statistics.CHUNK)


def row(table, title):
    """The cells of a line of a table."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {title} |"))
    return [text.strip() for text in line.strip("|").split("|")][1:]


@pytest.mark.usefixtures("few_resamples")
def test_a_page_gets_every_table_and_the_figure_of_its_study(tmp_path):
    page = tmp_path / "study.md"
    other = "<!-- study: state of other -->\nOLD\n<!-- end -->\n"
    page.write_text("# A study\n\n" + "\n".join(MARK.format(name, "UNWRITTEN") for name in TABLES) + other)
    results = read_results(write(tmp_path))
    none = tmp_path / "none.md"
    none.write_text(other)
    assert write_pages(results, [page, none]) == [page] and none.read_text() == other
    write_figure(results, tmp_path)
    text = page.read_text()
    assert "UNWRITTEN" not in text and other in text
    assert text.count("<!-- end -->") == len(TABLES) + 1
    assert "Interim" in text
    assert "no such file: captions (seeds 0, 1)." in text
    assert Image.open(tmp_path / "study-synthetic.png").size[0] > 400


def test_the_figure_and_tables_of_validation_objects_alone(tmp_path):
    found = result(0)
    found["rows"] = [one for one in found["rows"] if one["of"] != "memory_color"]
    (tmp_path / "seed.json").write_text(json.dumps(found))
    (tmp_path / "study.md").write_text("".join(MARK.format(name, "UNWRITTEN") for name in TABLES))
    results = read_results([tmp_path / "seed.json"])
    write_pages(results, [tmp_path / "study.md"])
    write_figure(results, tmp_path)
    assert row(answers(results), "VaLM with a score threshold")[:2] == ["88.9 / 88.9", "–"]
    assert "UNWRITTEN" not in (tmp_path / "study.md").read_text() and (tmp_path / "study-synthetic.png").exists()


def test_a_page_without_a_place_for_the_study_is_named(tmp_path):
    page = tmp_path / "study.md"
    page.write_text(MARK.format("nothing", ""))
    with pytest.raises(ValmError, match="a table 'nothing', expected one of state"):
        write_pages(read_results(write(tmp_path)), [page])
    page.write_text(MARK.format("state", "").replace("synthetic", "other"))
    with pytest.raises(ValmError, match=r"no table of the study synthetic .* <!-- study: state of synthetic -->"):
        write_pages(read_results(write(tmp_path)), [page])


def test_answers_are_raw_and_calibrated_by_picture(tmp_path):
    table = answers(read_results(write(tmp_path)))
    assert row(table, "VaLM with a score threshold") == ["88.9 / 88.9"] * 3 + ["–", "–"]
    shares = [100 * RED[some].mean() for some in (RED | True, PICTURED, ~PICTURED)]
    assert row(table, "base model, unmodified")[:3] == [f"{share:.1f} / {share:.1f}" for share in shares]


def test_a_number_of_fewer_seeds_says_which(tmp_path):
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(without(result(2), "blind")))
    first = secondary(read_results([*write(tmp_path), fewer])).splitlines()[2]
    cells = first.strip("| ").split(" | ")[1:]
    assert [cell.endswith("(seeds 0, 1)") for cell in cells] == [False, False, True, False]


def test_the_readme_says_what_the_study_found():
    results, fourth_study = (
        read_results(sorted((ROOT / "studies" / "results").glob(f"{name}-seed-*.json"))) for name in ("third", "fourth")
    )
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    differences = [
        results.difference(CUT, BASE, PRIMARY),
        results.difference(CUT, BLIND, PRIMARY),
        results.difference(CUT, BASE, PRIMARY, CALIBRATED),
        fourth_study.difference(READING, CUT, PEOPLE),
    ]
    assert [points(found) for found in differences if points(found) not in said] == []
    in_prompt, attended = (results.accuracy(arm, PRIMARY, keep=pictured) for arm in (("base", COLORED_CAPTIONS), CUT))
    assert f"{100 * in_prompt.value:.1f} % against {100 * attended.value:.1f} %" in said


def test_what_an_interval_says_stands_behind_it(tmp_path):
    table = secondary(read_results(write(tmp_path, range(5))))
    base, twin, blind, random = row(table, "MemoryColor, objects with a picture, uncalibrated")
    assert base == twin == random and base.endswith(", more")
    assert blind == "+0.0 [+0.0, +0.0], no difference"
    replaced = exchanged(read_results(write(tmp_path)))
    assert row(replaced, "same pictures, red and blue exchanged")[0].startswith("+100.0")
    agree = RIGHT != "green"
    difference = 100 * (8 / 9 - RED[agree].mean())
    right = "MemoryColor, objects whose pictures show the right colour, uncalibrated"
    assert row(table, right)[0].startswith(f"+{difference:.1f} [")


def test_the_hypotheses_are_decided_by_five_seeds_with_holms_correction(tmp_path):
    files = write(tmp_path, range(5))
    for number, file in enumerate(files):  # the seeds differ a little
        found = json.loads(file.read_text())
        for one in found["rows"]:
            if one["arm"] == "cut" and one["measure"] == "raw":
                one["hits"][0] = number
        file.write_text(json.dumps(found))
    few, all_seeds = (hypotheses(read_results(files[:count])) for count in (3, 5))
    assert row(all_seeds, "T2: base model, uncalibrated")[-1] == "holds"
    assert row(few, "T2: base model, uncalibrated")[-1] == "so far yes"
    assert row(all_seeds, "T1: query control (Blind), uncalibrated")[-1] == "does not hold"
    by_seed = [float(text) for text in row(all_seeds, "T2: base model, uncalibrated")[2].split(", ")]
    assert np.diff(by_seed) == pytest.approx([100 / (9 * len(RIGHT))] * 4, abs=0.11)
    assert re.match("Fewer than two seeds", hypotheses(read_results(files[:1])))


@pytest.mark.usefixtures("few_resamples")
def test_the_study_of_reading_is_about_that_arm(tmp_path):
    results = read_results(write(tmp_path, made=fourth))
    assert best(results, [READING_BLIND, READING_BLIND_ALL]) == READING_BLIND_ALL
    table = hypotheses(results)
    assert table.startswith("| MemoryColor and ColorTerms: VaLM trained for reading compared with |")
    difference = results.difference(READING, READING_BLIND_ALL, PEOPLE)
    control = "(query control trained for reading, at all tokens)"
    assert row(table, f"F1: query control, uncalibrated {control}")[0] == points(difference)
    assert row(table, "F3: VaLM with the old training, uncalibrated")[0].startswith("+11.1")
    others = row(secondary(results), "MemoryColor, uncalibrated")
    assert others[2].startswith("+11.1") and others[3].startswith("+100.0") and others[4] == others[5] == others[0]
    assert row(exchanged(results), "same pictures, red and blue exchanged")[0].startswith("+100.0")


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.02]) == pytest.approx([0.9, 0.04])
