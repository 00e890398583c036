"""Bootstrap intervals, and the paired comparison of two models on the same items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
PERMUTATIONS = 10_000
# Bootstrap weights drawn at once, to bound memory for 10,000 items.
CHUNK = 200

# Numbers of hits or tries, (seeds, items), or where each seed has items of its own an array (items,) of each.
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
    """The first of two models' numbers minus the second's on the same items, with its 95 % interval, and the p-value of
    a permutation test: how often a difference as large occurs if the models are swapped at random, item by item. None
    for several seeds, of which such a test knows nothing."""

    value: float
    low: float
    high: float
    p: float | None


def _same(ratio: np.ndarray) -> np.ndarray:
    return ratio


def ratio(
    hits: Counts, tries: Counts, seed: int = 0, transform: Callable[[np.ndarray], np.ndarray] = _same
) -> Estimate:
    """transform(sum of hits / sum of tries).

    The tries of one item, such as its prompts, are drawn together, as they are not independent.
    """
    drawn = _bootstrap(hits, seed) / _bootstrap(tries, seed)
    low, high = np.quantile(transform(drawn), [0.025, 0.975])
    return Estimate(float(transform(np.asarray(_total(hits) / _total(tries)))), float(low), float(high))


def accuracy(right: np.ndarray, seed: int = 0) -> Estimate:
    """The share of true values of (items,) or (items, prompts). The prompts of an item are drawn together."""
    right = right.reshape(len(right), -1)
    return ratio(right.sum(-1)[None].astype(float), np.full((1, len(right)), float(right.shape[1])), seed)


def paired(first: Counts, second: Counts, tries: Counts, seed: int = 0) -> Difference:
    """The difference of two models' hits / tries.

    Args:
        first, second: hits. The numbers of seeds may differ where these have the same items.
        tries: of both: (items,), or a list as theirs.
    """
    tries = tries[None] if isinstance(tries, np.ndarray) else tries
    drawn = [_bootstrap(each, seed) / len(each) for each in (first, second, tries)]
    low, high = np.quantile((drawn[0] - drawn[1]) / drawn[2], [0.025, 0.975])
    means = [_total(each) / len(each) for each in (first, second, tries)]
    p = _swapped(first[0] - second[0], seed) if len(first) == len(second) == 1 else None
    return Difference((means[0] - means[1]) / means[2], float(low), float(high), p)


def _swapped(differences: np.ndarray, seed: int) -> float:
    """The p-value of a permutation test: how often their sum is as large with random signs."""
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum())
    as_large = 0
    for _ in range(PERMUTATIONS // CHUNK):
        signs = generator.integers(0, 2, (CHUNK, len(differences))) * 2 - 1
        as_large += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
    return (as_large + 1) / (PERMUTATIONS // CHUNK * CHUNK + 1)


def _total(values: Counts) -> float:
    return float(sum(one.sum() for one in values))


def _bootstrap(values: Counts, seed: int) -> np.ndarray:
    """(RESAMPLES,): the sum of `values` over resampled items, and resampled seeds if there are several; of seeds with
    items of their own over the items of each that is drawn. The same draws for the same generator seed and numbers of
    seeds and items."""
    over_items, over_seeds = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    seeds = len(values)
    sums = []
    for _ in range(RESAMPLES // CHUNK):
        weights = over_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), CHUNK)  # (chunk, seeds)
        if isinstance(values, np.ndarray):
            items = values.shape[1]
            drawn = over_items.multinomial(items, np.full(items, 1 / items), CHUNK)  # (chunk, items)
            sums.append(np.einsum("ci,si,cs->c", drawn, values, weights, optimize=True))
        else:
            own = [
                over_items.multinomial(n * len(one), np.full(len(one), 1 / len(one)))
                for n, one in zip(weights.T, values, strict=True)
            ]
            sums.append(sum(drawn @ one for drawn, one in zip(own, values, strict=True)))
    return np.concatenate(sums)
