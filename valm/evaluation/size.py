"""Which of two things is bigger: 486 pairs of 41 objects (Bagherinezhad et al. 2016), yes or no.

The published script asks only in the order whose answer is yes, so a model that always says yes gets 100 %, and two
missing commas in it join three of its six prompts into one. "published" repeats both, to compare with published
numbers; "fair" has all six prompts and asks in both orders, so that every constant answer gets 50 %.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.evaluation.choice import PROTOCOLS
from valm.evaluation.files import read_lines
from valm.evaluation.scoring import Accuracy, answer_log_probs
from valm.model import VaLMForCausalLM

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


@dataclass(frozen=True)
class SizeResult:
    """Accuracies with their 95 % intervals over pairs. The pairs share objects, so the intervals are a little narrow.

    accuracy: over all pairs, prompts and, in the fair protocol, both orders.
    both_orders: share of pairs and prompts answered rightly in both orders; 0 for any constant answer.
    preferred: share of pairs and prompts in which "yes" is likelier, against "no", in the right order than in the
    other: what the model knows however fond of "yes" it is. Chance is 50 %.
    Both are None in the published protocol.
    said_yes: how often the answer was yes.
    """

    protocol: str
    prompts: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    accuracy: Accuracy
    both_orders: Accuracy | None
    preferred: Accuracy | None
    said_yes: float

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return asdict(self)


def load_size_pairs(path: str | os.PathLike) -> list[tuple[str, str]]:
    """A file of lines "bigger smaller".

    Raises:
        ValmError: the file is missing, or a line is not two words.
    """
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) != 2:
            raise ValmError(f"{path}, line {number}: expected two words, got {len(words)}")
        pairs.append((words[0], words[1]))
    return pairs


def evaluate_size(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    *,
    protocol: str = "fair",
    batch_size: int = 64,
    progress: str | None = None,
) -> SizeResult:
    """Asks whether one is bigger than the other, for `pairs` of (bigger, smaller).

    Raises:
        ValmError: no pairs, or a protocol there is not.
    """
    if protocol not in PROTOCOLS:
        raise ValmError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not pairs:
        raise ValmError("there are no pairs to ask for")
    fair = protocol == "fair"
    prompts = PROMPTS if fair else PUBLISHED_PROMPTS
    texts = [text for bigger, smaller in pairs for text in fill(prompts, bigger, smaller, fair)]
    scores = answer_log_probs(model, tokenizer, texts, YES_NO, bos=fair, batch_size=batch_size, progress=progress)
    margin = (scores[:, 0] - scores[:, 1]).double().numpy().reshape(len(pairs), len(prompts), -1)
    yes = margin > 0  # (pairs, prompts, orders)
    right = yes.copy()
    both_orders = preferred = None
    if fair:
        right[..., 1] = margin[..., 1] < 0
        both_orders = Accuracy.of(right.all(-1))
        preferred = Accuracy.of(margin[..., 0] > margin[..., 1])
    return SizeResult(
        protocol=protocol,
        prompts=prompts,
        pairs=tuple(pairs),
        accuracy=Accuracy.of(right),
        both_orders=both_orders,
        preferred=preferred,
        said_yes=float(yes.mean()),
    )


def fill(prompts: Sequence[str], bigger: str, smaller: str, both_orders: bool) -> list[str]:
    """Each prompt about two things; with `both_orders` each is followed by itself with the two exchanged."""
    orders = [(bigger, smaller), (smaller, bigger)] if both_orders else [(bigger, smaller)]
    return [
        prompt.replace("[ITEMA]", first).replace("[ITEMB]", second) for prompt in prompts for first, second in orders
    ]
