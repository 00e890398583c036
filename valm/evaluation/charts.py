"""The charts of the evaluation's report: every model on each task, and the first model's difference from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """How numbers are shown: multiplied by `factor` and formatted by `digits`. title: of the axis."""

    factor: float
    digits: str
    title: str = ""
    from_zero: bool = True

    def text(self, numbers: Mapping[str, float]) -> str:
        """A value, with its interval if there is one."""
        value, *interval = (format(number, self.digits) for number in self.scaled(numbers))
        return f"{value} [{', '.join(interval)}]" if interval else value

    def scaled(self, numbers: Mapping[str, float]) -> list[float]:
        return [self.factor * numbers[name] for name in ("value", "low", "high") if name in numbers]


# A chart shows the first of these metrics that its task has.
METRICS = {
    "accuracy": Quantity(100, ".1f", "accuracy in percent"),
    "word_perplexity": Quantity(1, ".4g", "perplexity per word", from_zero=False),
    "perplexity": Quantity(1, ".4g", "perplexity per token", from_zero=False),
}
DIFFERENCES = {
    "accuracy": Quantity(100, "+.1f", "points"),
    "nats per byte": Quantity(1, "+.3f", "nats per byte (less is better)"),
}


@dataclass(frozen=True)
class Chart:
    """One task in one protocol.

    rows: for each model its name, its number, and by how much `first` exceeds it (None without a comparison), with
    intervals.
    difference: the quantity of the comparisons; None without comparisons.
    majority: the accuracy of always giving the commonest answer, in percent; None if the task has no such answer.
    """

    task: str
    protocol: str
    items: int
    quantity: Quantity
    rows: tuple[tuple[str, Mapping[str, float], Mapping[str, float] | None], ...]
    first: str
    difference: Quantity | None
    majority: float | None


@dataclass(frozen=True)
class Axis:
    """A scale from `start` to `end`."""

    start: float
    end: float

    def place(self, value: float) -> float:
        """The position of a number, in percent of the axis; at an end if the number is not finite."""
        return min(100.0, max(0.0, 100 * (value - self.start) / (self.end - self.start)))


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """A chart for each task and protocol in which a model has a number."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if "not_applicable" not in row:
            panels.setdefault((row["task"], row["protocol"]), []).append(row)
    found = []
    for (task, protocol), rows in panels.items():
        metric = next(name for name in METRICS if name in rows[0]["metrics"])
        of_task = [p for p in results["pairs"] if (p["task"], p["protocol"]) == (task, protocol)]
        pairs = {p["second"]: p for p in of_task if p["metric"] in DIFFERENCES}
        difference = DIFFERENCES[next(iter(pairs.values()))["metric"]] if pairs else None
        baselines = rows[0]["metrics"].get("baselines")
        found.append(
            Chart(
                task,
                protocol,
                rows[0]["items"],
                METRICS[metric],
                tuple((row["model"], row["metrics"][metric], pairs.get(row["model"])) for row in rows),
                rows[0]["model"],
                difference,
                100 * baselines["majority"] if baselines and baselines["constants"] else None,
            )
        )
    return found


def axes(charts: Sequence[Chart]) -> dict[Quantity, Axis]:
    """One axis for each quantity, which spans its numbers in all charts, so that equal lengths mean equal numbers."""
    numbers: dict[Quantity, list[float]] = {}
    for chart in charts:
        for _, *shown in chart.rows:
            for quantity, estimate in zip((chart.quantity, chart.difference), shown, strict=True):
                if quantity is not None and estimate is not None:
                    numbers.setdefault(quantity, []).extend(quantity.scaled(estimate))
        if chart.majority is not None:
            numbers[chart.quantity].append(chart.majority)
    return {quantity: _axis([0.0, *values] if quantity.from_zero else values) for quantity, values in numbers.items()}


def _axis(values: Sequence[float]) -> Axis:
    """From the round number below the smallest finite value to the round number above the largest. A diverged model's
    perplexity is not finite."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    step = 10.0 ** math.floor(math.log10((high - low) or 1))
    start, end = math.floor(low / step) * step, math.ceil(high / step) * step
    return Axis(start, end if end > start else start + step)
