import json
import re
from pathlib import Path

import pytest
from PIL import Image

from studies.color.claims import CLAIMS, claims, holm
from studies.color.comparisons import (
    ALL_OF_PEOPLE,
    BASE,
    PRIMARY,
    PROMPT,
    VALM,
    follows,
    learned,
    points,
    signed,
)
from studies.color.config import EXCHANGES
from studies.color.report import TABLES, answers, curve, exchanged, secondary, summary, write_figure, write_pages
from studies.color.results import APART, PEOPLE, pictured, read_results
from tests.studies.color.synthetic import PICTURED, RIGHT, result, without, write
from valm.errors import ValmError
from valm.evaluation import statistics

ROOT = Path(__file__).parents[3]
MARK = "<!-- study: {} of synthetic -->\n{}\n<!-- end -->\n"
RED = RIGHT == "red"


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 4 * statistics.CHUNK)
    monkeypatch.setattr(statistics, "PERMUTATIONS", statistics.CHUNK)


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
    found["rows"] = [one for one in found["rows"] if one["of"] not in ("memory_color", "color_terms")]
    (tmp_path / "seed.json").write_text(json.dumps(found))
    (tmp_path / "study.md").write_text("".join(MARK.format(name, "UNWRITTEN") for name in TABLES))
    results = read_results([tmp_path / "seed.json"])
    write_pages(results, [tmp_path / "study.md"])
    write_figure(results, tmp_path)
    assert row(answers(results), "VaLM")[:2] == ["100.0 / 100.0", "–"]
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
    assert row(table, "VaLM") == ["100.0 / 100.0"] * 3 + ["–", "–"]
    shares = [100 * RED[some].mean() for some in (RED | True, PICTURED, ~PICTURED)]
    assert row(table, "base model, unmodified")[:3] == [f"{share:.1f} / {share:.1f}" for share in shares]


def test_a_number_of_fewer_seeds_says_which(tmp_path):
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(without(result(2), "control")))
    first = secondary(read_results([*write(tmp_path), fewer])).splitlines()[2]
    cells = first.strip("| ").split(" | ")[1:]
    assert [cell.endswith("(seeds 0, 1)") for cell in cells] == [False, True, False, False]


def test_the_readme_says_what_the_study_found():
    found = read_results(sorted((ROOT / "studies" / "results").glob("fifth-seed-*.json")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary(found) in readme
    said = " ".join(readme.split())
    differences = [
        found.difference(VALM, BASE, PEOPLE, APART, pictured),
        learned(found, ALL_OF_PEOPLE),
        follows(found, ALL_OF_PEOPLE, EXCHANGES[0]),
    ]
    assert [points(one) for one in differences if points(one) not in said] == []
    assert all(one.seeds == found.numbers == (20, 21, 22, 23, 24) for one in differences)
    in_prompt, attended = (found.accuracy(arm, PRIMARY, keep=pictured) for arm in (PROMPT, VALM))
    assert f"{100 * in_prompt.value:.1f} % against {100 * attended.value:.1f} %" in said


def test_a_small_difference_keeps_its_sign():
    values = (0.023, 0.0004, -0.0003, 0.0, -0.02)
    assert [signed(value) for value in values] == ["+2.3", "+0.04", "−0.03", "+0.0", "−2.0"]


def test_what_an_interval_says_stands_behind_it(tmp_path):
    table = secondary(read_results(write(tmp_path, range(5))))
    base, control, random, _ = row(table, "MemoryColor, objects with a picture, uncalibrated")
    assert base == random and base.endswith(", more")
    assert control == "+11.1 [+11.1, +11.1], more"
    replaced = exchanged(read_results(write(tmp_path)))
    assert row(replaced, "same pictures, red and blue exchanged")[0].startswith("+100.0")
    agree = RIGHT != "green"
    difference = 100 * (1 - RED[agree].mean())
    right = "MemoryColor, objects whose pictures show the right colour, uncalibrated"
    assert row(table, right)[0].startswith(f"+{difference:.1f} [")


def test_the_curve_has_each_number_of_steps_and_the_mean(tmp_path):
    table = curve(read_results(write(tmp_path)))
    assert row(table, "60")[:3] == ["33.3", "22.2", "+11.1 [+11.1, +11.1]"]
    assert row(table, "240")[3:5] == ["100.0", "88.9"]
    assert row(table, "mean") == ["–", "–", "+11.1 [+11.1, +11.1]"] * 2
    none = tmp_path / "none.json"
    none.write_text(json.dumps(result(0) | {"config": {"training": {"steps": 240}, "curve": []}}))
    assert curve(read_results([none])) == "The study has no curve."


def outcomes(files):
    """The last cells of the claims' rows: p, p of the claim, outcome."""
    return [line.strip("| ").split(" | ")[-3:] for line in claims(read_results(files)).splitlines()[2:8]]


def changed(files, change):
    """Writes rows of results after `change`, which gets a row and the number of its file."""
    for number, file in enumerate(files):
        found = json.loads(file.read_text())
        for one in found["rows"]:
            change(one, number)
        file.write_text(json.dumps(found))


def vary(one, number):
    """Makes the seeds differ a little."""
    if one["arm"].startswith("valm") and one["measure"] != "nats":
        one["hits"][0] = max(one["hits"][0] - number, 0)


@pytest.mark.usefixtures("few_resamples")
def test_the_claims_are_decided_by_five_seeds(tmp_path):
    files = write(tmp_path, range(5))
    changed(files, vary)
    assert sum(map(len, CLAIMS.values())) == 6
    assert [cells[1:] for cells in outcomes(files)] == [["< 0.001", "holds"]] * 6
    assert {cells[2] for cells in outcomes(files[:3])} == {"so far yes"}
    (line,) = (
        line for line in claims(read_results(files)).splitlines() if line.startswith("| (a) ") and "uncal" in line
    )
    values = [float(text) for text in line.split(" | ")[3].split(", ")]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert re.match("Fewer than two seeds", claims(read_results(files[:1])))


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("arms", "of", "measure", "fails"),
    [
        ("valm", ("memory_color", "color_terms"), "calibrated apart", 0),
        ("valm valm-60 valm-120", ("validation",), "raw", 1),
        ("valm", ("memory_color", "color_terms"), "other-colors", 2),
    ],
)
def test_a_claim_holds_only_if_all_its_parts_do(tmp_path, arms, of, measure, fails):
    def nothing(one, number):
        vary(one, number)
        if one["arm"] in arms.split() and one["of"] in of and one["measure"] == measure:
            one["hits"] = [number % 2] * len(one["hits"])

    files = write(tmp_path, range(5))
    changed(files, nothing)
    found = outcomes(files)
    claim_holds = [cells[2] == "holds" for cells in found]
    assert claim_holds == [number // 2 != fails for number in range(6)]
    parts = found[2 * fails : 2 * fails + 2]
    assert parts[0][1:] == parts[1][1:]


@pytest.mark.usefixtures("few_resamples")
def test_the_p_value_of_a_claim_is_the_largest_of_its_parts(tmp_path):
    def wobble(one, number):
        vary(one, number)
        if one["arm"] == "valm" and one["measure"] == "other-colors" and one["images"] == "other-colors":
            one["hits"] = [(9, 1, 8, 0, 5)[number]] * len(one["hits"])

    files = write(tmp_path, range(5))
    changed(files, wobble)
    first, second = outcomes(files)[4:]
    assert first[0] == "< 0.001" and float(second[0]) == pytest.approx(float(second[1]), abs=1e-3)
    assert first[1:] == second[1:]


@pytest.mark.usefixtures("few_resamples")
def test_images_say_more_than_their_query_only_if_both_intervals_do(tmp_path):
    def wobble(one, number):
        vary(one, number)
        if one["arm"] == "valm" and one["of"] == "validation" and one["measure"] == "raw":
            one["hits"] = [9 * (number % 2)] * len(one["hits"])

    files = write(tmp_path, range(5))
    changed(files, wobble)
    rows = [line for line in claims(read_results(files)).splitlines() if line.startswith("| no claim: ")]
    assert [row.split(" | ")[0].rpartition("after ")[2] for row in rows] == [
        "240 steps, validation objects",
        "240 steps, MemoryColor and ColorTerms",
    ]
    assert [row.strip("| ").split(" | ")[-1] for row in rows] == ["not both above 0", "both above 0"]


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.02]) == pytest.approx([0.9, 0.04])
