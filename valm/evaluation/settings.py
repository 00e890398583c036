"""The options of `valm eval`: what an evaluation asks, and which images models see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from valm.model.opening import Opening
from valm.options import listed, option


@dataclass(frozen=True, kw_only=True)
class Settings(Opening):
    """The options of an evaluation (`valm eval --help`), and of loading its models."""

    tasks: Sequence[str] | None = option(
        "tasks or groups, with commas between them: color,shape,size,material,nlu,lm (default: color, or none with "
        "--ask)",
        parse=listed,
    )
    ask: Sequence[str] = option(
        "your own questions: CSV files, with commas between them, with the columns question, answer, and choices with "
        "| between them (default: none)",
        (),
        parse=listed,
        metavar="FILE",
    )
    protocol: str = option(
        "published: prompts and scoring of the paper; fair: corrected prompts and scoring; your own questions use only "
        "fair",
        "both",
        choices=["fair", "published", "both"],
    )
    data: str | os.PathLike | None = option("folder of the evaluation sets (default: $VALM_EVAL_DATA)")
    limit: int | None = option("maximum items of each set, for a quick look", least=1)
    controls: Sequence[str] = option(
        "further rows for each model that sees images, with commas between them: off (no images), random (random "
        "images of the knowledge base), or a folder (its first K images for every token with images) (default: none)",
        (),
        parse=listed,
        metavar="off,random,FOLDER",
    )

    @property
    def protocols(self) -> tuple[str, ...]:
        return ("published", "fair") if self.protocol == "both" else (self.protocol,)
