"""Bootstrap intervals, and the paired comparison of two models on the same items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
PERMUTATIONS = 10_000
# Bootstrap weights drawn at once, to bound memory for 10,000 items.
CHUNK = 200


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
    """By how much the first of two models is better on the same items, with its 95 % interval, and the p-value of a
    permutation test: how often a difference as large occurs if the models are swapped at random."""

    value: float
    low: float
    high: float
    p: float


def _same(ratio: np.ndarray) -> np.ndarray:
    return ratio


def ratio(
    hits: np.ndarray, tries: np.ndarray, seed: int = 0, transform: Callable[[np.ndarray], np.ndarray] = _same
) -> Estimate:
    """transform(sum of hits / sum of tries), for hits and tries (seeds, items).

    The tries of one item, such as its prompts, are drawn together, as they are not independent.
    """
    drawn = _bootstrap(hits, seed) / _bootstrap(tries, seed)
    low, high = np.quantile(transform(drawn), [0.025, 0.975])
    return Estimate(float(transform(np.asarray(hits.sum() / tries.sum()))), float(low), float(high))


def accuracy(right: np.ndarray, seed: int = 0) -> Estimate:
    """The share of true values of (items,) or (items, prompts). The prompts of an item are drawn together."""
    right = right.reshape(len(right), -1)
    return ratio(right.sum(-1)[None].astype(float), np.full((1, len(right)), float(right.shape[1])), seed)


def paired(first: np.ndarray, second: np.ndarray, tries: np.ndarray, seed: int = 0) -> Difference:
    """The difference of two models' hits / tries.

    Args:
        first, second: (seeds, items) hits; the numbers of seeds may differ.
        tries: (items,), of both.
    """
    total = tries.sum()
    each = first.mean(0) - second.mean(0)  # (items,)
    weights = tries[None].astype(float)
    drawn = (_bootstrap(first, seed) / len(first) - _bootstrap(second, seed) / len(second)) / _bootstrap(weights, seed)
    low, high = np.quantile(drawn, [0.025, 0.975])
    generator = np.random.default_rng(seed)
    observed = abs(each.sum())
    as_large = 0
    for _ in range(PERMUTATIONS // CHUNK):
        signs = generator.integers(0, 2, (CHUNK, len(each))) * 2 - 1
        as_large += int((np.abs(signs @ each) >= observed - 1e-12).sum())
    p = (as_large + 1) / (PERMUTATIONS // CHUNK * CHUNK + 1)
    return Difference(float(each.sum() / total), float(low), float(high), p)


def _bootstrap(values: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES,): the sum of `values` (seeds, items) over resampled items, and resampled seeds if there are several;
    the same draws for the same generator seed and numbers of seeds and items."""
    seeds, items = values.shape
    over_items, over_seeds = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    sums = []
    for _ in range(RESAMPLES // CHUNK):
        drawn = over_items.multinomial(items, np.full(items, 1 / items), CHUNK)  # (chunk, items)
        weights = over_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), CHUNK)  # (chunk, seeds)
        sums.append(np.einsum("ci,si,cs->c", drawn, values, weights, optimize=True))
    return np.concatenate(sums)
