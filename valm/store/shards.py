"""Folders of numbered shards, written by one process or many, and resumed after any of them was killed.

    build.json          the plan: everything the result depends on; only while the folder is unfinished
    shard-00000.json    the record of shard 0, written when its files are complete; only while the folder is unfinished
    manifest.json       the plan, every shard with the checksums of its files, and a checksum of all this; only when the
                        folder is finished

A shard is the unit of work. It depends on the plan and on its own part of the source alone, so shards can be written in
any order and anywhere that sees the folder, and one that was begun twice is the same shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from valm.errors import ValmError
from valm.store.files import atomic_path, only_writer, read_json, writable_folder, write_json
from valm.store.manifest import (
    BUILD_FILE,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    Plan,
    ShardRecord,
    check_files,
    check_seal,
    file_entry,
    sealed,
)
from valm.store.shard_progress import Progress
from valm_kernels.atomic_files import is_temporary, remove_leftovers

SHARD_FILE = re.compile("shard-[0-9]{5,9}\\.json")
DELETE = "delete it or choose another folder"

# Writes one shard, given its number, its part of the source, and its progress.
Work = Callable[[int, Any, Progress], None]
# Runs the work for numbered parts of the source: here, or on other machines (valm/store/ray.py).
Runner = Callable[[Work, Iterable[tuple[int, Any]], Progress], None]


def run_here(work: Work, shards: Iterable[tuple[int, Any]], progress: Progress) -> None:
    """One shard after the other, in this process."""
    for number, part in shards:
        work(number, part, progress)


class ShardedBuild:
    """A folder of shards, finished or being written.

    Args:
        out: new, empty, or holding the build of the same plan, finished or not.
        what: what the folder will be, for errors.
        plan: everything the result depends on, as JSON.
        record: the schema of a shard's record.

    Raises:
        ValmError: `out` holds something else, or cannot be written.
    """

    def __init__(self, out: str | os.PathLike, what: str, plan: dict[str, Any], record: type = ShardRecord):
        self.out = writable_folder(out)
        self.what = what
        self.plan = plan
        self.record = record
        self._manifest: Manifest | None = None
        # when the plan was written that is there already, finished or not, in seconds since 1970
        self.since: float | None = None
        with self._lock():
            for file in (self.out / BUILD_FILE, self.out / MANIFEST_FILE):
                if file.exists():
                    self.since = file.stat().st_mtime
            self._look()

    @property
    def finished(self) -> bool:
        return self._manifest is not None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other processes from writing the folder while the block calls `write` and `finish`. Another process may
        have `finished` it before.

        Raises:
            ValmError: another process is writing it.
        """
        with self._lock():
            self._look()
            yield

    def _lock(self) -> AbstractContextManager[None]:
        return only_writer(
            self.out, f"another process is writing the {self.what} {self.out}; when it has ended, run the same again"
        )

    def _look(self) -> None:
        """Finds out whether the folder is finished, unfinished or new. A finished one does not change any more."""
        if self.finished:
            return
        if (self.out / MANIFEST_FILE).exists():
            manifest: Manifest = read_json(self.out / MANIFEST_FILE, "the manifest", Manifest)
            check_seal(manifest, self.out / MANIFEST_FILE)
            self._check_plan(manifest, f"already holds a {self.what}", "choose another folder")
            self._manifest = manifest
            self._remove_state()  # where it was killed between its last steps
        elif (self.out / BUILD_FILE).exists():
            state = read_json(self.out / BUILD_FILE, f"the state of an unfinished {self.what}", Plan, DELETE)
            self._check_plan(state, f"holds an unfinished {self.what}", DELETE)
        else:
            remove_leftovers(self.out)
            others = sorted(file.name for file in self.out.iterdir() if not is_temporary(file.name))
            if others:
                raise ValmError(f"the output folder {self.out} is not empty (it has {others[0]}); choose another")
            write_json(self.out / BUILD_FILE, {"plan": self.plan})

    def done(self) -> dict[int, dict[str, Any]]:
        """The record of every finished shard, by number.

        Raises:
            ValmError: one is damaged.
        """
        if self._manifest is not None:
            return {number: dict(shard) for number, shard in enumerate(self._manifest["shards"])}
        records = {}
        for file in sorted(self.out.glob("shard-*.json")):
            if SHARD_FILE.fullmatch(file.name):
                number = int(file.stem.partition("-")[2])
                records[number] = read_json(file, "the record of a shard", self.record, DELETE)
        try:
            check_files(self.out, records.items())
        except OSError as error:
            raise ValmError(f"cannot read the unfinished {self.what} {self.out}: {error}") from error
        except ValueError as error:
            raise ValmError(f"the unfinished {self.what} {self.out} is damaged: {error}; {DELETE}") from error
        return records

    def write(self, work: Work, parts: Iterable[Any], run: Runner, progress: Progress) -> None:
        """Writes the missing shards, from `parts` (the parts of the source, one per shard)."""
        done = self.done()
        run(work, ((number, part) for number, part in enumerate(parts) if number not in done), progress)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes `manifest`, with the plan and the shards, which finishes the folder."""
        shards = [record for _, record in sorted(self.done().items())]
        whole = sealed({**manifest, "plan": self.plan, "shards": shards})
        write_json(self.out / MANIFEST_FILE, whole)
        self._manifest = cast(Manifest, whole)
        self._remove_state()

    def abandon(self) -> None:
        """Removes all that was written. If killed meanwhile, it is still an unfinished build."""
        files = [entry["name"] for record in self.done().values() for entry in record["files"]]
        # the records before what they say is there
        for file in self.out.glob("shard-*.json"):
            file.unlink()
        for name in files:
            (self.out / name).unlink(missing_ok=True)
        self._remove_state()

    def _remove_state(self) -> None:
        for file in self.out.glob("shard-*.json"):
            file.unlink(missing_ok=True)
        remove_leftovers(self.out)
        (self.out / BUILD_FILE).unlink(missing_ok=True)

    def _check_plan(self, found: Plan, holds: str, advice: str) -> None:
        before = found["plan"]
        changed = [name for name in sorted({*before, *self.plan}) if before.get(name) != self.plan.get(name)]
        if changed:
            raise ValmError(
                f"{self.out} {holds} of another source or other settings ({', '.join(changed)} differ); {advice}"
            )


class ShardFiles:
    """Writes the files of shard `number` into `out`, each whole or not there, and at the end its record."""

    def __init__(self, out: Path, number: int):
        self.out = out
        self.number = number
        self._files: list[FileEntry] = []

    def write(self, kind: str, suffix: str, save: Callable[[Path], None]) -> None:
        """The file `kind`-`number``suffix`, which `save` writes to the path it is given."""
        path = self.out / f"{kind}-{self.number:05d}{suffix}"
        with atomic_path(path) as temporary:
            save(temporary)
        self._files.append(file_entry(path))

    def write_array(self, kind: str, array: np.ndarray) -> None:
        def save(path: Path) -> None:
            with open(path, "wb") as file:  # np.save adds .npy to a name
                np.save(file, array)

        self.write(kind, ".npy", save)

    def finish(self, **facts: Any) -> None:
        """The shard is whole: its record has `facts` and the checksums of its files."""
        write_json(self.out / f"shard-{self.number:05d}.json", {**facts, "files": self._files})
