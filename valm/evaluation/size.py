"""Which of two things is bigger: 486 pairs of 41 objects (Bagherinezhad et al. 2016), yes or no.

The published script asks only in the order whose answer is yes, so a constant yes scores 100 %, and two missing commas
join three of its six prompts into one. "published" repeats both, to compare with published numbers; "fair" has all six
prompts and asks in both orders, so that any constant answer scores 50 %.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from valm.errors import ValmError
from valm.evaluation.files import read_lines

PROMPTS = (
    "Is [ITEMA] bigger than [ITEMB]?",
    "Is [ITEMA] larger than [ITEMB]?",
    "Is [ITEMA] taller than [ITEMB]?",
    "[ITEMA] is bigger than [ITEMB], is it true?",
    "[ITEMA] is larger than [ITEMB], is it true?",
    "[ITEMA] is taller than [ITEMB], is it true?",
)
PUBLISHED_PROMPTS = (*PROMPTS[:3], "".join(PROMPTS[3:]))

YES_NO = ("yes", "no")
# Between the two objects in the name of an item.
BIGGER = " > "


def load_size_pairs(path: str | os.PathLike) -> list[tuple[str, str]]:
    """A file of lines "bigger smaller".

    Raises:
        ValmError: a line is not two words.
    """
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) != 2:
            raise ValmError(f"{path}, line {number}: expected two words, got {len(words)}")
        pairs.append((words[0], words[1]))
    return pairs


def objects_of(items: Sequence[str], candidates: Sequence[str]) -> np.ndarray | None:
    """Numbers (items, 2) of the objects in items "bigger > smaller"; None where the question is another one, whose
    items may be any text."""
    pairs = [item.split(BIGGER) for item in items]
    if tuple(candidates) != YES_NO or any(len(pair) != 2 for pair in pairs):
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for pair in pairs for name in pair))}
    return np.array([[numbers[name] for name in pair] for pair in pairs])


def fill(prompts: Sequence[str], bigger: str, smaller: str, both_orders: bool) -> list[str]:
    """Each prompt about two things; with `both_orders` each is followed by the same prompt with the two swapped."""
    orders = [(bigger, smaller), (smaller, bigger)] if both_orders else [(bigger, smaller)]
    return [
        prompt.replace("[ITEMA]", first).replace("[ITEMB]", second) for prompt in prompts for first, second in orders
    ]
