"""The colour of everyday things: MemoryColor and ColorTerms with the paper's nine prompts.

Two protocols. "published" does what the published script does, to compare with published numbers; "fair" corrects
what that script gets wrong:

=========================== ============================================ =====================================
                            published                                    fair
=========================== ============================================ =====================================
candidates                  the answers that occur in the file           the same eleven colours for every set
[DESCRIPTOR] of ColorTerms  left in the prompt as it stands              "the"
answers                     one piece each, the others are refused       log-probability summed over pieces
start of the text           no SOT                                       SOT, as in training
one answer per item         -                                            the vote of the prompts
a colour's own frequency    -                                            taken out (the calibrated accuracy)
=========================== ============================================ =====================================
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from valm.evaluation.choice import ChoiceResult, ask, check_protocol
from valm.evaluation.files import read_csv
from valm.model import VaLMForCausalLM

PROMPTS = (
    "Q: What is the color of [DESCRIPTOR] [ITEM]? A: It is",
    "What is the color of [DESCRIPTOR] [ITEM]? It is",
    "What is the usual color of [DESCRIPTOR] [ITEM]?",
    "What is the typical color of [DESCRIPTOR] [ITEM]?",
    "The color of [DESCRIPTOR] [ITEM] is",
    "The usual color of [DESCRIPTOR] [ITEM] is",
    "The common color of [DESCRIPTOR] [ITEM] is",
    "The typical color of [DESCRIPTOR] [ITEM] is",
    "[DESCRIPTOR] [ITEM] usually has the color of",
)

COLORS = ("white", "yellow", "green", "red", "grey", "brown", "black", "blue", "purple", "pink", "orange")


@dataclass(frozen=True)
class ColorItem:
    """A thing and its colour. The descriptor is what stands before the name ("a", "the inside of a", ""); None where
    the data have none."""

    item: str
    color: str
    descriptor: str | None = None


@dataclass(frozen=True)
class ColorResult(ChoiceResult):
    """A `ChoiceResult` whose answers are colours."""

    items: tuple[ColorItem, ...]


def load_memory_color(path: str | os.PathLike) -> list[ColorItem]:
    """MemoryColor (Norlund et al. 2021): 109 rows of Index,Descriptor,Item,Color.

    Raises:
        ValmError: the file is missing or has other columns.
    """
    rows = read_csv(path, ["Index", "Descriptor", "Item", "Color"])
    return [ColorItem(row["Item"], row["Color"], row["Descriptor"]) for row in rows]


def load_color_terms(path: str | os.PathLike) -> list[ColorItem]:
    """ColorTerms (Bruni et al. 2012): 52 rows of object,color.

    Raises:
        ValmError: the file is missing or has other columns.
    """
    return [ColorItem(row["object"], row["color"]) for row in read_csv(path, ["object", "color"])]


def evaluate_color(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[ColorItem],
    *,
    protocol: str = "fair",
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 64,
    progress: str | None = None,
) -> ColorResult:
    """Asks `model` for the colour of each item with each prompt (section 3.2 of the paper).

    A model that sees pictures needs its retriever first (`set_retriever`). Prompts have [ITEM] and may have
    [DESCRIPTOR].

    Raises:
        ValmError: no items, a prompt without [ITEM], an item whose colour is no candidate, or, in the published
            protocol, a colour that is not one piece for this tokenizer.
    """
    check_protocol(protocol, items, prompts)
    fair = protocol == "fair"
    right = [item.color for item in items]
    asked = ask(
        model,
        tokenizer,
        [[fill(prompt, item.item, item.descriptor, fair) for prompt in prompts] for item in items],
        right,
        COLORS if fair else tuple(dict.fromkeys(right)),
        fair=fair,
        batch_size=batch_size,
        progress=progress,
    )
    return ColorResult(protocol=protocol, prompts=tuple(prompts), items=tuple(items), **asked)


def fill(prompt: str, item: str, descriptor: str | None, fair: bool) -> str:
    """The prompt about `item`. Where the data have no descriptor, the published prompts say [DESCRIPTOR]."""
    if descriptor is None:
        descriptor = "the" if fair else "[DESCRIPTOR]"
    return " ".join(prompt.replace("[DESCRIPTOR]", descriptor).replace("[ITEM]", item).split())
