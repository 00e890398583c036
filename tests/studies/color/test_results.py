import copy
import json
import math

import numpy as np
import pytest

from studies.color.results import NATS, PEOPLE, pictured, pixels_agree, read_results, unpictured
from tests.studies.color.synthetic import ITEMS, PICTURED, RIGHT, result, without, write
from valm.errors import ValmError

VALM, BASE, CONTROL = ("valm", "retrieved"), ("base", "none"), ("control", "retrieved")
RED = (RIGHT == "red").mean()


def test_accuracy_and_difference(tmp_path):
    results = read_results(write(tmp_path))
    found = results.accuracy(VALM, "memory_color")
    assert found.value == pytest.approx(1) and (found.seeds, found.items) == ((0, 1), ITEMS)
    found = results.difference(VALM, BASE, "memory_color")
    assert found.value == pytest.approx(1 - RED)
    assert found.low < found.value < found.high
    assert found.p is None
    assert read_results(write(tmp_path, [0])).difference(VALM, BASE, "memory_color").p < 0.01


def test_things_that_each_seed_drew_anew_are_drawn_after_the_seed(tmp_path):
    results = read_results(write(tmp_path))
    found = results.difference(VALM, BASE, "validation")
    assert found.items == 2 * ITEMS
    alone = [results.of_seeds([seed]).difference(VALM, BASE, "validation").value for seed in (0, 1)]
    assert found.value == pytest.approx(np.mean(alone)) and found.low <= min(alone) and found.high >= max(alone)
    # of the same items, which are drawn together, the interval is another one
    assert found[1:3] != results.difference(VALM, BASE, "memory_color")[1:3]


def test_what_follows_the_images_is_counted_of_items_whose_colour_changes(tmp_path):
    found = read_results(write(tmp_path)).difference(("valm", "exchanged"), VALM, "memory_color", "exchanged")
    assert (found.value, found.items) == (pytest.approx(1.0), ITEMS - 1)


def test_a_difference_may_be_of_some_items(tmp_path):
    results = read_results(write(tmp_path))
    found = results.difference(VALM, ("valm", "taken-out"), "memory_color", keep=pictured)
    assert (found.value, found.items) == (pytest.approx(1 - (RIGHT[PICTURED] == "red").mean()), PICTURED.sum())
    assert results.difference(VALM, BASE, "validation", keep=unpictured).items == 2 * (~PICTURED).sum()
    no_red = results.difference(VALM, BASE, "memory_color", keep=lambda asked: asked.answers != "red")
    assert no_red.value == pytest.approx(1)  # the base always says "red"
    assert results.difference(VALM, BASE, "memory_color", keep=lambda asked: asked.answers == "black") is None


def test_a_thing_of_both_sets_counts_once(tmp_path):
    results = read_results(write(tmp_path))
    found = results.accuracy(VALM, PEOPLE)
    assert (found.value, found.items) == (1.0, 2 * ITEMS - 1)
    base = results.accuracy(BASE, PEOPLE, keep=pictured)
    red, first = RIGHT == "red", np.arange(ITEMS) > 0  # the first of the second set is the last of the first set
    assert base.items == PICTURED.sum() + (PICTURED & first).sum()
    assert base.value == pytest.approx((red[PICTURED].sum() + red[PICTURED & first].sum()) / base.items)
    assert results.accuracy(("valm", "exchanged"), PEOPLE, "exchanged").items == 2 * (ITEMS - 1)
    alone = result(0)
    alone["rows"] = [row for row in alone["rows"] if row["of"] != "color_terms"]
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    assert read_results([tmp_path / "alone.json"]).accuracy(BASE, PEOPLE) is None


@pytest.mark.parametrize("of", ["memory_color", "validation"])  # the same items in all seeds, and other ones
def test_a_mean_difference_sums_the_hits_of_several_trainings(tmp_path, of):
    results = read_results(write(tmp_path))
    curves = [results.curve(arm) for arm in ("valm", "control")]
    assert [list(curve) for curve in curves] == [[60, 120, 240]] * 2
    assert curves[0][60] == ("valm-60", "retrieved") and curves[0][240] == VALM
    pairs = list(zip(*(curve.values() for curve in curves), strict=True))
    assert results.mean_difference(pairs, of).value == pytest.approx(1 / 9)
    found = results.mean_difference([(one, BASE) for one, _ in pairs], of)
    alone = [results.difference(one, BASE, of) for one, _ in pairs]
    assert found.value == pytest.approx(np.mean([one.value for one in alone]))
    assert found.items == alone[0].items
    # items are drawn together, so that the interval is the mean of the intervals of constant shifts
    assert found[1:3] == pytest.approx(np.mean([one[1:3] for one in alone], axis=0))
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(without(result(2), "control-60")))
    assert read_results([*write(tmp_path), fewer]).mean_difference(pairs, of).seeds == (0, 1)


def test_nats_are_those_of_a_token(tmp_path):
    results = read_results(write(tmp_path))
    assert math.exp(results.accuracy(BASE, "prose", NATS).value) == pytest.approx(math.exp(2.5))
    assert results.difference(VALM, BASE, "prose", NATS).value == pytest.approx(-0.55)


def test_a_number_is_of_the_seeds_that_have_it(tmp_path):
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(without(result(2), "control")))
    results = read_results([fewer, *write(tmp_path)])
    assert CONTROL in results.arms and results.numbers == (0, 1, 2)
    assert results.accuracy(CONTROL, "memory_color").seeds == (0, 1)
    assert results.having(("memory_color", CONTROL), ("validation", VALM)).numbers == (0, 1)
    assert results.accuracy(VALM, "memory_color").seeds == (0, 1, 2)
    assert results.accuracy(("random", "off"), "memory_color") is None
    assert results.accuracy(VALM, "memory_color", keep=pixels_agree).items == (RIGHT != "green").sum()


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    files = write(tmp_path)
    with pytest.raises(ValmError, match="two of the results are of one seed"):
        read_results([files[0], files[0]])
    (tmp_path / "other.json").write_text(json.dumps(result(2) | {"recipe": "xyz"}))
    with pytest.raises(ValmError, match="different settings"):
        read_results([*files, tmp_path / "other.json"])
    with pytest.raises(ValmError, match="no results"):
        read_results([])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda found: found.pop("recipe"), "recipe"),
        (lambda found: found.pop("config"), "config"),
        (lambda found: found["config"].__setitem__("curve", ["x"]), "config.*curve"),
        (lambda found: found["rows"][0]["hits"].pop(), "lack answers"),
        (lambda found: found["asked"].pop(), "lack answers"),
        (lambda found: found["asked"][0]["tries"].pop(), "lack answers"),
        (lambda found: found["rows"][0].__setitem__("arm", "?"), r"a row that no study has: .*\?"),
        (lambda found: found["rows"][0].__setitem__("arm", "base-60"), "a row that no study has: .*base-60"),
        (lambda found: found["asked"][-1]["tries"].__setitem__(0, 0), "asked.*tries.*got 0"),
    ],
)
def test_damaged_results_are_refused(tmp_path, damage, message):
    found = copy.deepcopy(result(0))
    damage(found)
    (tmp_path / "damaged.json").write_text(json.dumps(found))
    with pytest.raises(ValmError, match=message) as error:
        read_results([tmp_path / "damaged.json"])
    assert "damaged.json" in str(error.value)
