"""The tables of the demo in README.md and docs/demo.md, from the results.json that `valm demo` writes."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

NAMES = {
    "valm": "**VaLM, 4 retrieved images per token**",
    "gpt2": "GPT-2\\*, its text-only twin: same data, order, seed and steps",
    "random_images": "VaLM with random images at test time",
    "valm_state_queries": "VaLM with state queries",
    "majority": "always the commonest colour",
}
HITS = {"top1": "first", "top4": "top 4", "top8": "top 8"}


def read(files: Sequence[Path]) -> list[Result]:
    """The results in `files`, in the order of their seeds."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(results, key=lambda result: result["seed"])


def short_table(result: Result) -> str:
    """One run on its held-out things."""
    heldout = result["things"]["heldout"]
    lines = [
        f"| Right answers for colours that stand in no text, seed {result['seed']} | {heldout} held-out things [95 %] |",
        "| --- | --- |",
    ]
    for name, label in NAMES.items():
        cell = _share(result["heldout_color_accuracy"][name])
        if name in result["details"]:
            low, high = map(_share, result["details"][name]["heldout"]["interval"])
            cell += f" [{low}, {high}]"
        if name != "valm_state_queries":
            lines.append(f"| {label} | {cell} |")
    return "\n".join(lines)


def tables(results: Sequence[Result]) -> str:
    """Several seeds: how they ran, accuracies, hit rates, and the answers before and after the exchange of channels."""
    return "\n\n".join([_conditions(results), _accuracies(results), _hit_rates(results), _exchange(results)])


def _conditions(results: Sequence[Result]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results[0]["versions"].items())
    seconds = ", ".join(f"{result['seconds_total']:.0f}" for result in results)
    return f"{results[0]['hardware']}; {versions}. The seeds took {seconds} seconds on a machine that others used too."


def _accuracies(results: Sequence[Result]) -> str:
    seeds = ", ".join(str(result["seed"]) for result in results)
    heads = [f"right answers, mean of nine prompts; seeds {seeds}"]
    for part, things in (("held-out things", "heldout"), ("things of MemoryColor", "memory_color")):
        counts = " or ".join(map(str, sorted({result["things"][things] for result in results})))
        heads += [f"{counts} {part}", "mean ± s.d."]
    rows = []
    for name, label in NAMES.items():
        cells = [label]
        for part in ("heldout_color_accuracy", "memory_color_accuracy"):
            shares = [result[part][name] for result in results]
            cells += [
                " ".join(map(_share, shares)),
                f"{_share(statistics.mean(shares))} ± {_share(statistics.stdev(shares))}",
            ]
        rows.append(cells)
    return _table(heads, rows)


def _hit_rates(results: Sequence[Result]) -> str:
    rows = [
        [f'query "{query}"', *(" ".join(_share(result["hit_rate"][query][top]) for result in results) for top in HITS)]
        for query in ("eot", "state")
    ]
    return _table(["own picture found by the last word of a question", *HITS.values()], rows)


def _exchange(results: Sequence[Result]) -> str:
    rows = []
    for color in ("red", "yellow", "grey"):
        before, after = (_answers(results, when, color) for when in ("before", "after"))
        rows.append([color, str(before.total()), _commonest(before), _commonest(after)])
    return _table(["red and blue exchanged, all seeds", "things", "answers before", "answers after"], rows)


def _answers(results: Sequence[Result], when: str, color: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result["red_blue_swap"][when].get(color, {}))
    return counts


def _commonest(counts: Counter[str]) -> str:
    return ", ".join(f"{answer} {count}" for answer, count in counts.most_common(2))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
