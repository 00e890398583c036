"""The questions of each task, in two protocols, and the same for lm-evaluation-harness (`tasks/`).

"published" repeats the prompts and the scoring behind the published numbers, with their faults; "fair" corrects them:
SOT before the text, answers of several tokens, both orders of a pair, every label among the candidates.
"""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from valm.errors import ValmError
from valm.evaluation import color, size
from valm.evaluation.sets import AG_NEWS_LABELS, DBPEDIA_LABELS, NEGATIVE, POSITIVE, SETS, Item, read_set

PUBLISHED, FAIR = "published", "fair"

VICOMTE_COLORS = (*color.COLORS[:4], "gray", *color.COLORS[5:], "silver")
MATERIALS = (
    "wood", "metal", "gold", "plastic", "glass", "concrete", "leather", "paper", "stone", "ceramic", "bronze",
    "rubber", "cotton", "denim", "iron", "cloth", "jade", "tin",
)  # fmt: skip
MATERIAL_PROMPTS = (
    "The [ITEM] is made of",
    "The [ITEM] is usually made of",
    "The material of the [ITEM] is",
    "Q: What is the [ITEM] made of? A: It is made of",
)
# The published code has neither data nor script for the paper's ObjectShape: its numbers fit Blind-VaLM's five prompts
# on ViComTe's 101 things (Zhang et al. 2022). 81 of them are round: always saying "round" scores 80.2 %, above every
# published number. Look at the balanced accuracy.
SHAPES = ("round", "square", "triangle", "polygon", "oval", "star", "rhombus", "heart")
SHAPE_PROMPTS = (
    "[ITEM] can be shape",
    "[ITEM] has shape",
    "[ITEM] is of shape",
    "The shape of [ITEM] can be",
    "The shape of the [ITEM] is",
)
SENTIMENT_PROMPT = "Review: [ITEM] Sentiment: "
TOPIC_PROMPT = "input: [ITEM] type: "
# Of each class, in the published protocol of MPQA: the paper's majority is 50.00.
MPQA_BALANCED = 1000


@dataclass(frozen=True)
class Questions:
    """Texts to be continued by one of the candidates.

    items: what is drawn in a bootstrap. texts: (items, prompts). right: (items, prompts), numbers of candidates.
    """

    task: str
    protocol: str
    items: tuple[str, ...]
    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    candidates: tuple[str, ...]
    right: tuple[tuple[int, ...], ...]

    @property
    def fair(self) -> bool:
        return self.protocol == FAIR


@dataclass(frozen=True)
class Documents:
    """Texts whose tokens are predicted: perplexity, and for LAMBADA the last word."""

    task: str
    protocol: str
    texts: tuple[str, ...]
    last_word: bool


@dataclass(frozen=True)
class Task:
    """A task: its set, its name in tables, and its protocols.

    build: (items of the set, protocol) -> what is asked. table: which of the paper's tables has it.
    note: what differs from the conditions of the published numbers.
    """

    name: str
    group: str
    protocols: tuple[str, ...]
    build: Callable[[str, list[Any], str], Questions | Documents]
    table: int | None = None
    note: str = ""

    @property
    def title(self) -> str:
        return SETS[self.name].title


def _ask(
    task: str,
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
                raise ValmError(f"the answer {answer!r} in {SETS[task].title} is not one of {', '.join(candidates)}")
    return Questions(
        task,
        protocol,
        tuple(items),
        tuple(prompts),
        tuple(map(tuple, texts)),
        tuple(candidates),
        tuple(tuple(candidates.index(answer) for answer in row) for row in answers),
    )


def _about_things(
    prompts: Sequence[str], labels: Sequence[str], distinct: bool = False
) -> Callable[[str, list[Item], str], Questions]:
    """distinct: in the published protocol the candidates are the answers that occur."""

    def build(task: str, items: list[Item], protocol: str) -> Questions:
        fair = protocol == FAIR
        answers = [item.answer for item in items]
        return _ask(
            task,
            protocol,
            [item.text for item in items],
            prompts,
            [[color.fill(prompt, item.text, item.descriptor, fair) for prompt in prompts] for item in items],
            [[answer] * len(prompts) for answer in answers],
            tuple(dict.fromkeys(answers)) if distinct and not fair else labels,
        )

    return build


def _about_sizes(task: str, pairs: list[tuple[str, str]], protocol: str) -> Questions:
    """fair: each prompt is followed by the same with the two swapped, whose answer is no."""
    fair = protocol == FAIR
    prompts = size.PROMPTS if fair else size.PUBLISHED_PROMPTS
    texts = [size.fill(prompts, bigger, smaller, fair) for bigger, smaller in pairs]
    answers = [size.YES_NO if fair else size.YES_NO[:1]] * len(prompts)
    row = [answer for both in answers for answer in both]
    names = [f"{bigger}{size.BIGGER}{smaller}" for bigger, smaller in pairs]
    return _ask(task, protocol, names, prompts, texts, [row] * len(pairs), size.YES_NO)


def _about_texts(prompt: str, labels: Sequence[str]) -> Callable[[str, list[Item], str], Questions]:
    def build(task: str, items: list[Item], protocol: str) -> Questions:
        asked = prompt.rstrip() if protocol == FAIR else prompt
        if task == "mpqa" and protocol == PUBLISHED:
            items = _balanced(items, MPQA_BALANCED)
        texts = [[asked.replace("[ITEM]", item.text)] for item in items]
        answers = [[item.answer] for item in items]
        return _ask(task, protocol, [item.text for item in items], [asked], texts, answers, labels)

    return build


def _balanced(items: list[Item], count: int) -> list[Item]:
    """At most `count` items of each answer, drawn by a fixed seed, in the order of the file."""
    generator = random.Random(0)
    chosen: set[int] = set()
    for answer in dict.fromkeys(item.answer for item in items):
        of_answer = [number for number, item in enumerate(items) if item.answer == answer]
        chosen.update(generator.sample(of_answer, min(count, len(of_answer))))
    return [items[number] for number in sorted(chosen)]


def _passages(task: str, texts: list[str], protocol: str) -> Documents:
    return Documents(task, protocol, tuple(texts), last_word=True)


def _articles(task: str, texts: list[str], protocol: str) -> Documents:
    """published: each paragraph alone."""
    if protocol == PUBLISHED:
        texts = [paragraph for text in texts for paragraph in text.split("\n") if paragraph.strip()]
    return Documents(task, protocol, tuple(texts), last_word=False)


BOTH = (PUBLISHED, FAIR)
_BLIND = "the prompt is Blind-VaLM's: VaLM's own was not released"
TASKS = {
    task.name: task
    for task in (
        Task("memory_color", "color", BOTH, _about_things(color.PROMPTS, color.COLORS, distinct=True), 2),
        Task(
            "color_terms",
            "color",
            BOTH,
            _about_things(color.PROMPTS, color.COLORS, distinct=True),
            2,
            "published: the prompts say [DESCRIPTOR], which the released script never replaces",
        ),
        Task("vicomte_color", "color", (FAIR,), _about_things(color.PROMPTS, VICOMTE_COLORS)),
        Task(
            "object_shape",
            "shape",
            BOTH,
            _about_things(SHAPE_PROMPTS, SHAPES, distinct=True),
            2,
            "neither data nor prompts were released: ViComTe's 101 things and Blind-VaLM's five prompts, which the "
            "published numbers fit",
        ),
        Task(
            "relative_size",
            "size",
            BOTH,
            _about_sizes,
            2,
            "published: the right answer is always yes, and missing commas join three of the six prompts",
        ),
        Task("vicomte_size", "size", (FAIR,), _about_sizes),
        Task("vicomte_material", "material", (FAIR,), _about_things(MATERIAL_PROMPTS, MATERIALS)),
        Task("sst2", "nlu", BOTH, _about_texts(SENTIMENT_PROMPT, (POSITIVE, NEGATIVE)), 4, _BLIND),
        Task(
            "mpqa",
            "nlu",
            BOTH,
            _about_texts(SENTIMENT_PROMPT, (POSITIVE, NEGATIVE)),
            4,
            f"{_BLIND}; published: {MPQA_BALANCED:,} phrases of each class, as a majority of 50 % suggests",
        ),
        Task(
            "dbpedia",
            "nlu",
            BOTH,
            _about_texts(TOPIC_PROMPT, tuple(DBPEDIA_LABELS.values())),
            4,
            f"{_BLIND}; another sample of the test part",
        ),
        Task(
            "ag_news",
            "nlu",
            BOTH,
            _about_texts(TOPIC_PROMPT, tuple(AG_NEWS_LABELS.values())),
            4,
            f"{_BLIND}; another sample of the test part",
        ),
        Task(
            "wikitext103",
            "lm",
            BOTH,
            _articles,
            5,
            "published: per token of the model's own tokenizer, each paragraph alone; not comparable across tokenizers",
        ),
        Task(
            "lambada",
            "lm",
            BOTH,
            _passages,
            5,
            "published: not the same text (the paper's perplexity is that of the old tokenised passages, ours of the "
            "detokenised ones); accuracy of the last token alone",
        ),
    )
}
GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values()))


def chosen_tasks(names: str) -> list[Task]:
    """The tasks of a list like "color,lambada", of names of tasks and groups.

    Raises:
        ValmError: there is none of a name; the message has the nearest one.
    """
    found: dict[str, Task] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        chosen = [task for task in TASKS.values() if name in (task.name, task.group)]
        if not chosen:
            near = difflib.get_close_matches(name, [*GROUPS, *TASKS], n=1, cutoff=0)[0]
            raise ValmError(
                f"there is no task {name!r}: did you mean {near!r}? Groups: {', '.join(GROUPS)}; tasks: "
                f"{', '.join(TASKS)}"
            )
        found |= {task.name: task for task in chosen}
    if not found:
        raise ValmError("no tasks are named: give --tasks, for example color")
    return list(found.values())


def what_is_asked(
    task: Task,
    protocol: str,
    data: str | os.PathLike | None = None,
    *,
    allow_download: bool = False,
    limit: int | None = None,
) -> Questions | Documents:
    """The questions or documents of `task`, of at most `limit` items drawn by a fixed seed.

    Raises:
        ValmError: as `read_set`, or the task has no such protocol.
    """
    if protocol not in task.protocols:
        raise ValmError(f"{task.name} has no protocol {protocol!r}, only {', '.join(task.protocols)}")
    items = read_set(task.name, data, allow_download=allow_download)
    asked = task.build(task.name, items, protocol)
    # after the set as a whole, whose items say which candidates there are, and which items a protocol draws
    return asked if limit is None or limit >= len(asked.texts) else _some(asked, limit)


def _some(asked: Questions | Documents, limit: int) -> Questions | Documents:
    """`limit` of the items, drawn by a fixed seed, as they are asked among all."""
    chosen = sorted(random.Random(0).sample(range(len(asked.texts)), limit))
    if isinstance(asked, Documents):
        return replace(asked, texts=tuple(asked.texts[number] for number in chosen))
    return replace(
        asked,
        items=tuple(asked.items[number] for number in chosen),
        texts=tuple(asked.texts[number] for number in chosen),
        right=tuple(asked.right[number] for number in chosen),
    )


def harness_docs(task: str, protocol: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The task's documents for lm-evaluation-harness: its `custom_dataset`, called with the task's dataset_kwargs and
    the harness's --metadata, which may have `data`, the folder of the sets. Where that has no file, the Hub is asked.
    """
    import datasets

    asked = what_is_asked(TASKS[task], protocol, data, allow_download=True)
    if isinstance(asked, Documents):
        rows: list[dict[str, Any]] = [{"page": text} for text in asked.texts]
    else:
        rows = [
            {"item": item, "text": text, "choices": list(asked.candidates), "label": label}
            for item, texts, labels in zip(asked.items, asked.texts, asked.right, strict=True)
            for text, label in zip(texts, labels, strict=True)
        ]
    return {"test": datasets.Dataset.from_list(rows)}
