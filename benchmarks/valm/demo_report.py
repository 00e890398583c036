"""The table of the demo in README.md, from the results.json that `make demo` writes."""

from __future__ import annotations

import json
from pathlib import Path

from valm.text import markdown_table

NAMES = {
    "valm": "**VaLM, 4 retrieved images per token**",
    "gpt2": "GPT-2\\*, its text-only twin: same data, order, seed and steps",
    "random_images": "VaLM with random images at test time",
    "majority": "always the commonest colour",
}


def table(file: Path) -> str:
    """The accuracies on the held-out objects, with their intervals."""
    result = json.loads(file.read_text(encoding="utf-8"))
    head = (
        f"Right answers for colours that stand in no text, seed {result['seed']}",
        f"{result['things']['heldout']} held-out things [95 %]",
    )
    rows = []
    for name, label in NAMES.items():
        cell = _share(result["heldout_color_accuracy"][name])
        if name in result["details"]:
            low, high = map(_share, result["details"][name]["heldout"]["interval"])
            cell += f" [{low}, {high}]"
        rows.append((label, cell))
    return markdown_table(head, rows)


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
