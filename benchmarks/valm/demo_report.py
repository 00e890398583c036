"""The table of the demo in README.md, from the results.json that `make demo` writes."""

from __future__ import annotations

import json
from pathlib import Path

from valm.text import markdown_table

NAMES = {
    "valm": "**VaLM, 4 retrieved images per token**",
    "gpt2": "Text-only baseline: same data, order, seed and steps",
    "blind": "Query control (Blind): CLIP's vector of the text instead of images",
    "random_images": "VaLM, random images at test time",
    "majority": "Always the most frequent colour",
}


def table(file: Path) -> str:
    """The accuracies on the held-out objects, with their intervals."""
    result = json.loads(file.read_text(encoding="utf-8"))
    head = (
        f"Model, seed {result['seed']}",
        f"Accuracy on {result['things']['heldout']} objects whose colour no text states [95 %]",
    )
    rows = []
    accuracy = result["heldout_color_accuracy"]
    for name, label in ((name, label) for name, label in NAMES.items() if name in accuracy):
        cell = _share(accuracy[name])
        if name in result["details"]:
            low, high = map(_share, result["details"][name]["heldout"]["interval"])
            cell += f" [{low}, {high}]"
        rows.append((label, cell))
    return markdown_table(head, rows)


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
