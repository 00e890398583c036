import numpy as np
import pytest

from valm.evaluation.statistics import Estimate, accuracy, paired, ratio


def test_interval_holds_the_true_share_about_95_times_in_100():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(50):
        estimate = ratio((random.random((1, 100)) < 0.6).astype(float), np.ones((1, 100)), seed)
        held += estimate.low <= 0.6 <= estimate.high
    assert 44 <= held <= 50


def test_prompts_of_an_item_do_not_make_the_interval_narrower():
    right = np.random.default_rng(0).random((1, 50)) < 0.5
    alone, nine_times = accuracy(right), accuracy(np.repeat(right[..., None], 9, axis=2))
    assert alone == nine_times
    assert alone.high - alone.low > 0.2
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_several_seeds_are_pooled_and_widen_the_interval_where_they_disagree():
    items = np.random.default_rng(0).random(200) < 0.5
    agreeing = np.stack([items] * 3).astype(float)
    disagreeing = np.stack([items, np.zeros(200), np.ones(200)]).astype(float)
    tries = np.ones((3, 200))
    first, second = ratio(agreeing, tries), ratio(disagreeing, tries)
    assert first.value == pytest.approx(items.mean()) and second.value == pytest.approx((items.mean() + 1) / 3)
    assert second.high - second.low > 2 * (first.high - first.low)


def test_transform_is_applied_to_the_ratio():
    nats, tokens = np.array([[2.0, 4.0]]), np.array([[1.0, 2.0]])
    assert ratio(nats, tokens, transform=np.exp).value == pytest.approx(np.exp(2))


def test_paired_finds_what_unpaired_intervals_hide():
    random = np.random.default_rng(1)
    hard = random.random(150) < 0.5
    second = hard.astype(float)
    first = np.maximum(second, random.random(150) < 0.1)  # right wherever the other is, and a little more
    found = paired(first[None], second[None], np.ones(150))
    assert found.value == pytest.approx((first - second).mean())
    assert 0 < found.low <= found.value <= found.high and found.p < 0.02
    one, two = (ratio(values[None], np.ones((1, 150))) for values in (first, second))
    assert one.low < two.high


def test_p_values_of_equal_models_are_spread_evenly():
    random = np.random.default_rng(0)
    small = 0
    for _ in range(30):
        first, second = (random.random((1, 60)) < 0.5).astype(float), (random.random((1, 60)) < 0.5).astype(float)
        small += paired(first, second, np.ones(60)).p < 0.1
    assert small <= 8
    same = np.ones((1, 10))
    assert paired(same, same, np.ones(10)).p == 1


def test_seeds_with_items_of_their_own_are_drawn_before_these():
    """As wide as where the same items disagree by seed, whatever the number of items."""
    random = np.random.default_rng(0)
    tries = [np.ones(200) for _ in range(5)]
    alike = [(random.random(200) < 0.5).astype(float) for _ in range(5)]
    unlike = [(random.random(200) < share).astype(float) for share in (0.3, 0.4, 0.5, 0.6, 0.7)]
    narrow, wide = ratio(alike, tries), ratio(unlike, tries)
    assert narrow.value == pytest.approx(np.mean(alike)) and 0.04 < narrow.high - narrow.low < 0.09
    assert 0.2 < wide.high - wide.low < 0.3
    found = paired(unlike, alike, tries)
    assert found.value == pytest.approx(np.mean(unlike) - np.mean(alike)) and found.p is None
    assert 0.2 < found.high - found.low < 0.32
    one = paired(unlike[:1], alike[:1], tries[:1])
    assert one == paired(np.stack(unlike[:1]), np.stack(alike[:1]), tries[0]) and 0.01 < one.p < 0.05


def test_models_with_different_numbers_of_seeds_are_compared_by_their_means():
    first, second = np.array([[1.0, 1.0, 0.0]]), np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert paired(first, second, np.ones(3)).value == pytest.approx(2 / 3 - 1 / 6)
    first, second = np.ones((1, 100)), np.tile(np.arange(100) % 2.0, (4, 1))
    found = paired(first, second, np.ones(100))
    assert found.value == 0.5 and 0.38 < found.low < 0.5 < found.high < 0.62


def test_pairs_of_objects_are_drawn_by_their_objects():
    """A model has an opinion of each object, unrelated to the truth: of 60 intervals 0.42 hold chance by pairs."""
    random = np.random.default_rng(0)
    first, second = np.triu_indices(30, 1)
    objects, tries = np.stack([first, second], 1), np.full((1, len(first)), 6.0)

    def ignorant():
        opinion = random.normal(size=30)
        margin = (opinion[first] - opinion[second])[:, None] + random.normal(size=(len(first), 6))
        return (margin > 0).sum(-1)[None].astype(float)

    held, by_pairs, equal = 0, 0, 0
    for _ in range(20):
        one, two = ignorant(), ignorant()
        found, narrow = ratio(one, tries, objects=objects), ratio(one, tries)
        assert found.value == narrow.value
        held += found.low <= 0.5 <= found.high
        by_pairs += narrow.low <= 0.5 <= narrow.high
        difference = paired(one, two, tries[0], objects=objects)
        assert difference.p is None
        equal += difference.low <= 0 <= difference.high
    assert held >= 17 and equal >= 17 and by_pairs <= 13


def test_a_resample_without_any_pair_is_left_out():
    found = ratio(np.array([[1.0, 0.0]]), np.ones((1, 2)), objects=np.array([[0, 1], [2, 3]]))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
