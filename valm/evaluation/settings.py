"""What an evaluation asks, and of which images: the options of `valm eval`, which are the fields of `Settings`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from valm.model.opening import Opening
from valm.options import option


def listed(text: str) -> tuple[str, ...]:
    """The parts of a text between its commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


@dataclass(frozen=True, kw_only=True)
class Settings(Opening):
    """The options of an evaluation (`valm eval --help`), and how its models are opened."""

    tasks: Sequence[str] | None = option(
        "tasks or groups, with commas between them: color,shape,size,material,nlu,lm (default: color; with --ask none)",
        parse=listed,
    )
    ask: Sequence[str] = option(
        "one's own questions: CSV files, with commas between them, whose columns are question, answer, and choices "
        "with | between them (default: none)",
        (),
        parse=listed,
        metavar="FILE",
    )
    protocol: str = option(
        "prompts and scoring of the paper, fair ones, or both; one's own questions have the fair ones alone",
        "both",
        choices=["fair", "published", "both"],
    )
    data: str | os.PathLike | None = option("folder of the evaluation sets (default: $VALM_EVAL_DATA)")
    limit: int | None = option("so many items of each set only, for a quick look", least=1)
    controls: Sequence[str] = option(
        "further rows for each model that sees images, with commas between them: off (without images), random (random "
        "ones of its knowledge base), or a folder (its first K images for every token that has some) (default: none)",
        (),
        parse=listed,
        metavar="off,random,FOLDER",
    )

    @property
    def protocols(self) -> tuple[str, ...]:
        return ("published", "fair") if self.protocol == "both" else (self.protocol,)
