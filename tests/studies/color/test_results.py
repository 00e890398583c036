import json
import math

import numpy as np
import pytest

from studies.color.results import read_results
from studies.color.scoring import compact, expanded
from tests.studies.color.synthetic import ITEMS, PROMPTS, result, write
from valm.errors import ValmError


def test_answers_are_the_same_after_they_were_written():
    answers = np.random.default_rng(0).integers(0, 12, (5, 9))
    assert (expanded(compact(answers)) == answers).all()


def test_accuracy_and_difference(tmp_path):
    results = read_results(write(tmp_path))
    assert results.hits("valm", "retrieved", "memory_color").shape == (2, ITEMS)
    assert results.accuracy("valm", "retrieved", "memory_color").value == pytest.approx(8 / 9)
    right = expanded(result(0)["sets"]["memory_color"]["right"])[:, 0]
    expected = 8 / 9 - (right == 0).mean()
    found = results.difference(("valm", "retrieved"), ("twin", "none"), "memory_color")
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high
    assert found.p is None
    alone = read_results(write(tmp_path, [0]))
    assert alone.difference(("valm", "retrieved"), ("twin", "none"), "memory_color").p < 0.01


def test_things_that_each_seed_drew_anew_are_drawn_after_the_seed(tmp_path):
    results = read_results(write(tmp_path))
    assert [len(one) for one in results.hits("valm", "retrieved", "validation")] == [ITEMS, ITEMS]
    assert results.accuracy("valm", "retrieved", "validation").value == pytest.approx(8 / 9)
    assert len(results.pictured("validation")) == 2 * ITEMS
    found = results.difference(("valm", "retrieved"), ("twin", "none"), "validation")
    alone = [
        read_results(write(tmp_path, [seed])).difference(("valm", "retrieved"), ("twin", "none"), "validation").value
        for seed in (0, 1)
    ]
    assert found.value == pytest.approx(np.mean(alone)) and found.low <= min(alone) and found.high >= max(alone)


def test_follows_counts_answers_with_the_colour_that_the_images_now_have(tmp_path):
    results = read_results(write(tmp_path))
    found, count = results.follows("valm", "exchanged", "memory_color")
    assert count == ITEMS - 1  # the first has no picture with a colour
    assert found.value == pytest.approx(1.0)  # before, its one wrong answer was another colour


def test_added_pictures_are_judged_by_the_items_that_have_one(tmp_path):
    results = read_results(write(tmp_path))
    found, count = results.added("valm", "memory_color")
    right = expanded(result(0)["sets"]["memory_color"]["right"])[::2, 0]
    assert count == ITEMS // 2
    assert found.value == pytest.approx(8 / 9 - (right == 0).mean())


def test_items_are_left_out_by_their_right_answer(tmp_path):
    whole = read_results(write(tmp_path))
    right = expanded(result(0)["sets"]["memory_color"]["right"])[:, 0]
    some = whole.without("red")
    assert some.hits("twin", "none", "memory_color").shape == (2, (right != 0).sum())
    assert some.accuracy("twin", "none", "memory_color").value == 0  # it always says "red"
    assert [len(one) for one in some.hits("twin", "none", "validation")] == [(right != 0).sum()] * 2
    assert (some.pictured("memory_color") == (np.arange(ITEMS) % 2 == 0)[right != 0]).all()
    found, count = some.follows("valm", "exchanged", "memory_color")
    assert found.value == pytest.approx(1.0) and count == (right != 0)[1:].sum()
    assert some.perplexity("twin", "none", "prose") == whole.perplexity("twin", "none", "prose")
    assert whole.without("black") == whole


def test_perplexity(tmp_path):
    results = read_results(write(tmp_path))
    assert results.perplexity("twin", "none", "prose").value == pytest.approx(math.exp(2))
    worse = results.nats_difference(("valm", "retrieved"), ("twin", "none"), "prose")
    assert worse.value == pytest.approx(1.0)


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    files = write(tmp_path)
    with pytest.raises(ValmError, match="seed 0 have a row of twin, none, memory_color"):
        read_results([files[0], files[0]])
    other = result(2) | {"recipe": "xyz"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValmError, match="different settings"):
        read_results([*files, tmp_path / "other.json"])
    again = result(0, items=ITEMS - 1)
    again["rows"] = [row | {"arm": "noise"} for row in again["rows"]]
    (tmp_path / "again.json").write_text(json.dumps(again))
    with pytest.raises(ValmError, match="seed 0 asked different questions"):
        read_results([*files, tmp_path / "again.json"])
    again = result(0)
    again["rows"] = [row | {"arm": "noise"} for row in again["rows"]]
    again["rows"][-1]["tokens"] = [2, 5]
    (tmp_path / "again.json").write_text(json.dumps(again))
    with pytest.raises(ValmError, match="seed 0 read different texts as prose"):
        read_results([*files, tmp_path / "again.json"])
    with pytest.raises(ValmError, match="no results"):
        read_results([])


def test_two_files_of_a_seed_with_different_arms_are_read_together(tmp_path):
    whole = result(0)
    for name, arms in (("blind", ("blind",)), ("rest", ("twin", "valm"))):
        part = {
            "rows": [row for row in whole["rows"] if row["arm"] in arms],
            "losses": {arm: loss for arm, loss in whole["losses"].items() if arm in arms},
            "seconds": whole["seconds"] | {name: 1.0},
            "study": name,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(whole | part))
    together = read_results([tmp_path / "blind.json", tmp_path / "rest.json"])
    assert len(together.seeds) == 1
    assert together.seeds[0]["losses"] == whole["losses"]
    assert together.seeds[0]["study"] == "rest"  # the twin's, whichever comes first
    assert together.seeds[0]["seconds"].keys() == {"clip", "blind", "rest"}
    difference = (("valm", "retrieved"), ("blind", "retrieved"), "memory_color")
    assert together.difference(*difference) == read_results(write(tmp_path, [0])).difference(*difference)


def test_two_files_of_a_seed_say_together_what_is_missing_and_what_their_clips_are(tmp_path):
    whole, files = result(0), []
    for name, arms, more in (
        ("rest", ("twin", "valm"), {"missing": ["relative_size"], "clip": {"R@1": 0.5}}),
        ("other", ("blind",), {"missing": ["relative_size", "captions"], "clip": {"R@1": 0.51, "colorless R@1": 0.4}}),
    ):
        losses = {arm: loss for arm, loss in whole["losses"].items() if arm in arms}
        rows = [row for row in whole["rows"] if row["arm"] in arms]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(whole | more | {"rows": rows, "losses": losses}))
    together = read_results(files)
    assert together.missing() == {"relative_size": [0], "captions": [0]}
    assert together.seeds[0]["clip"] == {"R@1": 0.5, "colorless R@1": 0.4}
    files[1].write_text(json.dumps(json.loads(files[1].read_text()) | {"clip": {"R@1": 0.6}}))
    with pytest.raises(ValmError, match="seed 0 are of different CLIPs: see 'R@1'"):
        read_results(files)


def test_a_number_can_be_of_the_seeds_that_have_it(tmp_path):
    fewer = result(2)
    fewer["rows"] = [row for row in fewer["rows"] if row["arm"] != "blind"]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    results = read_results([*write(tmp_path), tmp_path / "fewer.json"])
    blind = ("blind", "retrieved")
    assert blind in results.arms()
    assert [seed["seed"] for seed in results.having("memory_color", blind).seeds] == [0, 1]
    assert len(results.having("memory_color", ("valm", "retrieved")).seeds) == 3
    with pytest.raises(ValmError, match="seed 2 have no row of blind"):
        results.accuracy(*blind, "memory_color")


def test_a_row_that_is_not_there_is_named(tmp_path):
    results = read_results(write(tmp_path))
    assert not results.having("memory_color", ("noise", "noise")).seeds
    with pytest.raises(ValmError, match="seed 0 have no row of noise, noise, memory_color"):
        results.accuracy("noise", "noise", "memory_color")
    assert results.prompts("memory_color") == PROMPTS


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda found: found.pop("recipe"), "lacks 'recipe'|recipe"),
        (lambda found: found["rows"][0].pop("raw"), "lack answers"),
        (lambda found: found["rows"][0].pop("calibrated"), "lack answers"),
        (lambda found: found["rows"][0]["raw"].pop(), "lack answers"),
        (lambda found: found["rows"][0]["raw"].__setitem__(0, "9" * PROMPTS), "lack answers"),
        (lambda found: found["sets"].pop("memory_color"), "lack answers"),
        (lambda found: found["sets"]["memory_color"].pop("colors"), "lack answers"),
        (lambda found: found["rows"][-1]["tokens"].pop(), "lack answers"),
        (lambda found: found["rows"][0].__setitem__("arm", "?"), r"a row that no study has: .*\?"),
        (lambda found: found["rows"][0].__setitem__("images", "?"), r"a row that no study has: .*\?"),
        (lambda found: found["rows"][-1]["tokens"].__setitem__(0, 0), "rows.*tokens.*got 0"),
    ],
)
def test_damaged_results_are_refused(tmp_path, damage, message):
    found = result(0)
    damage(found)
    (tmp_path / "damaged.json").write_text(json.dumps(found))
    with pytest.raises(ValmError, match=message) as error:
        read_results([tmp_path / "damaged.json"])
    assert "damaged.json" in str(error.value)
