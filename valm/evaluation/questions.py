"""The questions of each set in two protocols, for `valm eval` and for lm-evaluation-harness.

"published" repeats the prompts and the scoring behind the published numbers, with their faults; "fair" corrects them
(docs/reference/test-sets.md describes both).
"""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from valm.errors import ValmError
from valm.evaluation.sets import GROUPS, SETS, EvaluationSet, Item, read_set

PUBLISHED, FAIR = "published", "fair"
COLOR_PROMPTS, COLORS = SETS["memory_color"].prompts, SETS["memory_color"].labels
YES_NO = SETS["relative_size"].labels
# Between the two objects in the name of an item.
BIGGER = " > "
# Items of each class in the published protocol of MPQA, because the paper's majority is 50.00.
MPQA_BALANCED = 1000


@dataclass(frozen=True)
class Questions:
    """Texts to be continued by one of the candidates.

    items: the units of a bootstrap. texts: (items, prompts). candidates: of every item; empty if they differ between
    items, and `choices` lists them by item. right: (items, prompts), numbers of candidates.
    """

    task: str
    protocol: str
    items: tuple[str, ...]
    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    candidates: tuple[str, ...]
    right: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[str, ...], ...] = ()

    @property
    def fair(self) -> bool:
        return self.protocol == FAIR

    @property
    def candidates_of_items(self) -> tuple[tuple[str, ...], ...]:
        return self.choices or (self.candidates,) * len(self.items)

    @property
    def answers(self) -> np.ndarray:
        """The right answers (items, prompts)."""
        each = zip(self.candidates_of_items, self.right, strict=True)
        return np.array([[candidates[number] for number in row] for candidates, row in each])

    @property
    def objects(self) -> np.ndarray | None:
        """Numbers (items, 2) of the objects in a set about pairs; a bootstrap then resamples objects."""
        return objects_of(self.items, self.candidates) if self.task in SETS else None


@dataclass(frozen=True)
class Documents:
    """Texts whose tokens are predicted: perplexity, and for LAMBADA the last word."""

    task: str
    protocol: str
    texts: tuple[str, ...]
    last_word: bool


def build(of: EvaluationSet, items: list[Any], protocol: str) -> Questions | Documents:
    """The questions or documents for the items of a set. Raises ValmError if an item's answer is not among the
    labels."""
    return ASK[of.ask](of, items, protocol)


def _ask(
    of: EvaluationSet,
    protocol: str,
    items: Sequence[str],
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    candidates: Sequence[str],
) -> Questions:
    for row in answers:
        for answer in row:
            if answer not in candidates:
                raise ValmError(f"the answer {answer!r} in {of.title} is not one of {', '.join(candidates)}")
    return Questions(
        of.name,
        protocol,
        tuple(items),
        tuple(prompts),
        tuple(map(tuple, texts)),
        tuple(candidates),
        tuple(tuple(candidates.index(answer) for answer in row) for row in answers),
    )


def _about_things(of: EvaluationSet, items: list[Item], protocol: str) -> Questions:
    """published: the candidates are the answers that occur."""
    fair = protocol == FAIR
    names, answers = [item.text for item in items], [item.answer for item in items]
    texts = [[fill(prompt, item.text, item.descriptor, fair) for prompt in of.prompts] for item in items]
    right = [[answer] * len(of.prompts) for answer in answers]
    return _ask(of, protocol, names, of.prompts, texts, right, of.labels if fair else tuple(dict.fromkeys(answers)))


def fill(prompt: str, item: str, descriptor: str | None, fair: bool) -> str:
    """The prompt about `item`. If the data contain no descriptor, the published prompts contain [DESCRIPTOR]."""
    if descriptor is None:
        descriptor = "the" if fair else "[DESCRIPTOR]"
    return " ".join(prompt.replace("[DESCRIPTOR]", descriptor).replace("[ITEM]", item).split())


def _about_sizes(of: EvaluationSet, pairs: list[tuple[str, str]], protocol: str) -> Questions:
    """fair: each prompt is followed by the prompt with the objects swapped, whose answer is no."""
    fair = protocol == FAIR
    prompts = of.prompts if fair else (*of.prompts[:3], "".join(of.prompts[3:]))
    texts = [
        [
            prompt.replace("[ITEMA]", first).replace("[ITEMB]", second)
            for prompt in prompts
            for first, second in ([pair, pair[::-1]] if fair else [pair])
        ]
        for pair in pairs
    ]
    right = [[*(YES_NO if fair else YES_NO[:1])] * len(prompts)] * len(pairs)
    return _ask(of, protocol, [BIGGER.join(pair) for pair in pairs], prompts, texts, right, YES_NO)


def objects_of(items: Sequence[str], candidates: Sequence[str]) -> np.ndarray | None:
    """Numbers (items, 2) of the objects in items "bigger > smaller"; None for other questions, whose items may be any
    text."""
    pairs = [item.split(BIGGER) for item in items]
    if tuple(candidates) != YES_NO or any(len(pair) != 2 for pair in pairs):
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for pair in pairs for name in pair))}
    return np.array([[numbers[name] for name in pair] for pair in pairs])


def _about_texts(of: EvaluationSet, items: list[Item], protocol: str) -> Questions:
    (prompt,) = of.prompts
    asked = prompt.rstrip() if protocol == FAIR else prompt
    texts = [[asked.replace("[ITEM]", item.text)] for item in items]
    answers = [[item.answer] for item in items]
    return _ask(of, protocol, [item.text for item in items], [asked], texts, answers, of.labels)


def _about_balanced_texts(of: EvaluationSet, items: list[Item], protocol: str) -> Questions:
    """published: at most MPQA_BALANCED items of each answer, sampled with a fixed seed, in the order of the file."""
    if protocol == PUBLISHED:
        generator = random.Random(0)
        chosen: set[int] = set()
        for answer in dict.fromkeys(item.answer for item in items):
            of_answer = [number for number, item in enumerate(items) if item.answer == answer]
            chosen.update(generator.sample(of_answer, min(MPQA_BALANCED, len(of_answer))))
        items = [items[number] for number in sorted(chosen)]
    return _about_texts(of, items, protocol)


def _passages(of: EvaluationSet, texts: list[str], protocol: str) -> Documents:
    return Documents(of.name, protocol, tuple(texts), last_word=True)


def _articles(of: EvaluationSet, texts: list[str], protocol: str) -> Documents:
    """published: each paragraph is a text."""
    if protocol == PUBLISHED:
        texts = [paragraph for text in texts for paragraph in text.split("\n") if paragraph.strip()]
    return Documents(of.name, protocol, tuple(texts), last_word=False)


def _own(of: EvaluationSet, items: list[Item], protocol: str) -> Questions:
    """If all items have the same candidates in any order, the candidates are stored once."""
    same = len({frozenset(item.choices) for item in items}) == 1
    choices = tuple(items[0].choices if same else item.choices for item in items)
    return Questions(
        of.name,
        protocol,
        tuple(item.text for item in items),
        ("[ITEM]",),
        tuple((item.text,) for item in items),
        choices[0] if same else (),
        tuple((each.index(item.answer),) for each, item in zip(choices, items, strict=True)),
        () if same else choices,
    )


ASK: Mapping[str, Callable[[EvaluationSet, list[Any], str], Questions | Documents]] = {
    "things": _about_things,
    "sizes": _about_sizes,
    "texts": _about_texts,
    "balanced_texts": _about_balanced_texts,
    "passages": _passages,
    "articles": _articles,
    "own": _own,
}


def chosen_sets(names: Sequence[str]) -> list[EvaluationSet]:
    """The sets with the names of sets or groups in `names`.

    Raises:
        ValmError: a name is unknown; the message shows the nearest name.
    """
    found: dict[str, EvaluationSet] = {}
    for name in names:
        chosen = [one for one in SETS.values() if name in (one.name, one.group)]
        if not chosen:
            near = difflib.get_close_matches(name, [*GROUPS, *SETS], n=1, cutoff=0)[0]
            raise ValmError(
                f"there is no task {name!r}: did you mean {near!r}? Groups: {', '.join(GROUPS)}; tasks: "
                f"{', '.join(SETS)}"
            )
        found |= {one.name: one for one in chosen}
    if not found:
        raise ValmError("no tasks are named: give --tasks, for example color")
    return list(found.values())


def what_is_asked(
    of: EvaluationSet,
    protocol: str,
    data: str | os.PathLike | None = None,
    *,
    allow_download: bool = False,
    limit: int | None = None,
) -> Questions | Documents:
    """The questions or documents of a set, of at most `limit` items sampled with a fixed seed.

    Raises:
        ValmError: as in `read_set`, or the set has no such protocol.
    """
    if protocol not in of.protocols:
        raise ValmError(f"{of.name} has no protocol {protocol!r}, only {', '.join(of.protocols)}")
    asked = build(of, read_set(of, data, allow_download=allow_download), protocol)
    # limit only now, because candidates and a protocol's sample depend on all items of the set
    return asked if limit is None or limit >= len(asked.texts) else _some(asked, limit)


def _some(asked: Questions | Documents, limit: int) -> Questions | Documents:
    """`limit` of the items, sampled with a fixed seed, with the questions that are asked for the whole set."""
    chosen = sorted(random.Random(0).sample(range(len(asked.texts)), limit))
    names = ("texts",) if isinstance(asked, Documents) else ("items", "texts", "right", "choices")
    some: dict[str, Any] = {
        name: tuple(values[number] for number in chosen) for name in names if (values := getattr(asked, name))
    }
    return replace(asked, **some)


def harness_docs(task: str, protocol: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The set's documents, as a `custom_dataset` of lm-evaluation-harness.

    The harness calls it with the task's dataset_kwargs and its --metadata, which may contain `data`, the folder of the
    sets. If the folder does not contain the file, the set is downloaded from the Hub.
    """
    import datasets

    asked = what_is_asked(SETS[task], protocol, data, allow_download=True)
    if isinstance(asked, Documents):
        rows: list[dict[str, Any]] = [{"page": text} for text in asked.texts]
    else:
        rows = [
            {"item": item, "text": text, "choices": list(asked.candidates), "label": label}
            for item, texts, labels in zip(asked.items, asked.texts, asked.right, strict=True)
            for text, label in zip(texts, labels, strict=True)
        ]
    return {"test": datasets.Dataset.from_list(rows)}
