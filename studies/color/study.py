"""A study, its folders, and the command that runs its stages."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studies.color.config import HELDOUT, VALIDATION, StudyConfig
from valm.errors import ValmError

STUDY_FILE = "study.json"
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
        validation: ask about validation objects only.
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

    def clip(self, seed: int) -> str:
        """The CLIP of the knowledge bases of a seed."""
        return str(self.config.clip.get("pretrained", self.seed_folder(seed) / "clip"))

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
