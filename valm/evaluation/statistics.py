"""Bootstrap intervals, and the paired comparison of two models on the same items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
PERMUTATIONS = 10_000
# Resamples computed at once, to bound memory for 10,000 items.
CHUNK = 200

# Resampling fewer items than this says little about other items, so no interval is shown.
FEWEST = 20

# Numbers of hits or tries: (seeds, items), or an array (items,) for each seed if the seeds have different items.
Counts = np.ndarray | list[np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with the 95 % interval of a bootstrap over items, and over seeds if there are several."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference:
    """The first model's number minus the second's on the same items, with its 95 % interval. p: from a permutation
    test, how often swapping the models at random, item by item, gives a difference as large. None for several seeds
    and for pairs of objects, for which the test is not valid."""

    value: float
    low: float
    high: float
    p: float | None


def as_json(found: Estimate | Difference, items: int) -> dict[str, float | None]:
    """The numbers as results contain them: with fewer than FEWEST items the value alone, without interval and p."""
    numbers = asdict(found)
    return numbers if items >= FEWEST else {"value": numbers["value"]}


def _same(ratio: np.ndarray) -> np.ndarray:
    return ratio


def ratio(
    hits: Counts,
    tries: Counts,
    seed: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] = _same,
    objects: np.ndarray | None = None,
) -> Estimate:
    """transform(sum of hits / sum of tries).

    The tries of one item, such as its prompts, are resampled together, because they are not independent.

    Args:
        objects: numbers (items, 2), if items are pairs of objects. Then objects are resampled, because one object
            affects many pairs, and a pair counts as often as the product of its two objects' counts.
    """
    drawn = _drawn(objects, _bootstrap(hits, seed, objects), _bootstrap(tries, seed, objects))
    low, high = np.quantile(transform(drawn), [0.025, 0.975])
    return Estimate(float(transform(np.asarray(_total(hits) / _total(tries)))), float(low), float(high))


def accuracy(right: np.ndarray, objects: np.ndarray | None = None) -> Estimate:
    """The share of true values in `right`, (seeds, items) or (seeds, items, prompts). objects as in `ratio`."""
    right = right.reshape(*right.shape[:2], -1)
    return ratio(right.sum(-1).astype(float), np.full(right.shape[:2], float(right.shape[2])), objects=objects)


def _drawn(objects: np.ndarray | None, hits: np.ndarray, tries: np.ndarray) -> np.ndarray:
    """hits / tries of each resample, without resamples of objects that form no pair of the items."""
    kept = slice(None) if objects is None else tries > 0
    return hits[kept] / tries[kept]


def paired(
    first: Counts, second: Counts, tries: Counts, seed: int = 0, objects: np.ndarray | None = None
) -> Difference:
    """The difference of two models' hits / tries.

    Args:
        first, second: hits. The numbers of seeds may differ if all seeds have the same items.
        tries: of both models: (items,), or a list as in first and second.
        objects: as in `ratio`.
    """
    tries = tries[None] if isinstance(tries, np.ndarray) else tries
    drawn = [_bootstrap(each, seed, objects) / len(each) for each in (first, second, tries)]
    low, high = np.quantile(_drawn(objects, drawn[0] - drawn[1], drawn[2]), [0.025, 0.975])
    means = [_total(each) / len(each) for each in (first, second, tries)]
    one_of_each = len(first) == len(second) == 1 and objects is None
    p = _swapped(first[0] - second[0], seed) if one_of_each else None
    return Difference((means[0] - means[1]) / means[2], float(low), float(high), p)


def _swapped(differences: np.ndarray, seed: int) -> float:
    """The p-value of a permutation test: how often the sum with random signs is as large."""
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum())
    as_large = 0
    for _ in range(PERMUTATIONS // CHUNK):
        signs = generator.integers(0, 2, (CHUNK, len(differences))) * 2 - 1
        as_large += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
    return (as_large + 1) / (PERMUTATIONS // CHUNK * CHUNK + 1)


def _total(values: Counts) -> float:
    return float(sum(one.sum() for one in values))


def _bootstrap(values: Counts, seed: int, objects: np.ndarray | None = None) -> np.ndarray:
    """(RESAMPLES,): the sum of `values` over resampled items, and resampled seeds if there are several. If seeds have
    different items, each resampled seed's items are resampled. The resamples depend only on the generator's seed and
    the numbers of seeds and items. objects: see `ratio`; all seeds then have the same items."""
    over_items, over_seeds = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    seeds = len(values)
    sums = []
    for _ in range(RESAMPLES // CHUNK):
        weights = over_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), CHUNK)  # (chunk, seeds)
        if isinstance(values, np.ndarray):
            count = values.shape[1] if objects is None else objects.max() + 1
            drawn = over_items.multinomial(count, np.full(count, 1 / count), CHUNK)  # (chunk, items or objects)
            if objects is not None:
                drawn = drawn[:, objects[:, 0]] * drawn[:, objects[:, 1]]
            sums.append(np.einsum("ci,si,cs->c", drawn, values, weights, optimize=True))
        else:
            own = [
                over_items.multinomial(n * len(one), np.full(len(one), 1 / len(one)))
                for n, one in zip(weights.T, values, strict=True)
            ]
            sums.append(sum(drawn @ one for drawn, one in zip(own, values, strict=True)))
    return np.concatenate(sums)
