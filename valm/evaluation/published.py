"""The paper's tables (Wang et al. 2022): their columns in each protocol, and the published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from valm.evaluation.questions import FAIR, PUBLISHED
from valm.evaluation.sets import SETS


class Column(NamedTuple):
    """A metric of a task. title: added to the task's title if the metric is not plain accuracy."""

    task: str
    metric: str = "accuracy"
    title: str = ""


@dataclass(frozen=True)
class Layout:
    """A table of the report. rows: the published numbers, one for each column, in percent or as perplexities."""

    title: str
    protocol: str
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""


def _of(table: int) -> tuple[Column, ...]:
    return tuple(Column(name) for name, one in SETS.items() if one.table == table)


TABLE_2 = "Table 2: colour, shape and size, accuracy in percent"
TABLE_4 = "Table 4: language understanding, accuracy in percent"
TABLE_5 = "Table 5: language modelling"
FAULTS = "The paper's prompts and scoring with their known faults."

LAYOUTS = (
    Layout(
        TABLE_2,
        PUBLISHED,
        _of(2),
        {
            "GPT-2*": (44.14, 39.10, 51.09, 47.22),
            "BERT": (24.34, 26.33, 31.86, 34.78),
            "CaptionBERT": (24.84, 28.40, 38.14, 66.05),
            "CLIP": (26.25, 23.08, 13.66, 47.99),
            "OSCAR": (20.32, 16.86, 33.14, 50.14),
            "VisualBERT": (26.68, 38.02, 11.14, 67.23),
            "VaLM, K = 4": (53.99, 52.66, 62.77, 85.03),
            "VaLM, K = 8": (58.64, 50.19, 59.41, 62.35),
        },
        FAULTS,
    ),
    Layout(
        TABLE_4,
        PUBLISHED,
        _of(4),
        {
            "Majority": (50.90, 50.00, 9.4, 25.0),
            "GPT-2*": (68.04, 71.25, 67.20, 53.51),
            "VaLM, K = 4": (70.12, 78.70, 72.27, 53.81),
            "VaLM, K = 8": (67.33, 77.35, 68.48, 59.77),
        },
        FAULTS,
    ),
    Layout(
        TABLE_5,
        PUBLISHED,
        (
            Column("wikitext103", "perplexity", "perplexity"),
            Column("lambada", "perplexity", "perplexity"),
            Column("lambada", "accuracy", "accuracy"),
        ),
        {
            "GPT-2*": (36.44, 42.46, 42.17),
            "VaLM, K = 4": (35.78, 42.51, 42.65),
            "VaLM, K = 8": (35.76, 42.38, 42.87),
        },
        "Perplexity per token of each model's own tokenizer; the text differs from the paper's (see the conditions).",
    ),
    Layout(TABLE_2, FAIR, _of(2)),
    Layout(TABLE_4, FAIR, _of(4)),
    Layout(
        TABLE_5,
        FAIR,
        (
            Column("wikitext103", "word_perplexity", "per word"),
            Column("wikitext103", "byte_perplexity", "per byte"),
            Column("lambada", "word_perplexity", "per word"),
            Column("lambada", "byte_perplexity", "per byte"),
            Column("lambada", "target_perplexity", "last word"),
            Column("lambada", "accuracy", "accuracy"),
        ),
        note="Per word and per byte of the text, in any vocabulary. A tokenizer that drops case or blanks, as CLIP's "
        "does, leaves less to predict: compare such a model only with models of the same tokenizer.",
    ),
)
