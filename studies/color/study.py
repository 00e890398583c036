"""A study, its folders, and the command that runs its stages."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from studies.color.config import HELDOUT, VALIDATION, Arm, StudyConfig
from valm.errors import ValmError

STUDY_FILE = "study.json"
# In the folder of a model: a `Training`.
TRAINING_FILE = "training.json"
# The folder of the CLIP that cannot know colours; the text with all questions about validation things.
COLORLESS, QUESTIONS = "colorless", "questions"


class Training(TypedDict):
    """The loss of each step, and what was measured of the model (`ImageTrainer.model_numbers`)."""

    losses: list[float]
    numbers: dict[str, float]


# Runs a command line of `valm` and returns its exit status.
Command = Callable[[list[str]], int]


@dataclass(frozen=True)
class Study:
    """A study with its folders and the command that runs its stages.

    Args:
        config: the study.
        out: folder of everything that it writes.
        command: `valm.cli.main`.
        data: folder of the test sets.
        validation: ask about validation things only.
        progress: print the stages and show progress bars.
    """

    config: StudyConfig
    out: Path
    command: Command
    data: Path | None
    validation: bool = False
    progress: bool = True

    @property
    def pictures(self) -> Path:
        return self.out / "pictures"

    @property
    def tests(self) -> list[str]:
        """The tests of the config, without the test sets if `validation`."""
        return [name for name in self.config.tests if not self.validation or name in (VALIDATION, HELDOUT)]

    def seed_folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def kb_folder(self, seed: int, arm: Arm) -> Path:
        """The folder with the CLIP, the knowledge bases and the retrieved corpora of an arm."""
        return self.seed_folder(seed) / COLORLESS if arm.colorless else self.seed_folder(seed)

    def clip(self, folder: Path) -> str:
        """The CLIP of the knowledge bases in `folder`."""
        trained = "pretrained" not in self.config.clip or folder.name == COLORLESS
        return str(folder / "clip" if trained else self.config.clip["pretrained"])

    def valm(self, *arguments: object) -> None:
        """Runs `valm arguments`.

        Raises:
            ValmError: the command failed; it has printed why.
        """
        line = [str(argument) for argument in arguments]
        if self.progress:
            print(f"$ valm {shlex.join(line)}", flush=True)
        if self.command(line if self.progress else [*line, "--quiet"]) != 0:
            raise ValmError(f"this stage of the study failed: valm {shlex.join(line)}")
