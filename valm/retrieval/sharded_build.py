"""Folders of numbered shards, written by one process or by many, and resumed after any of them was killed.

    build.json          the plan: everything the result depends on; only while the folder is unfinished
    shard-00000.json    what shard 0 holds, written when its files are whole; only while the folder is unfinished
    manifest.json       the plan, and every shard with the checksums of its files; only when the folder is finished

A shard is the unit of work. It depends on the plan and on its own part of the source alone, so shards can be written in
any order and anywhere that sees the folder, and one that was begun twice is the same shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from valm.errors import ValmError
from valm.files import atomic_path, read_json, writable_folder, write_json

MANIFEST_FILE = "manifest.json"
BUILD_FILE = "build.json"


class Progress(Protocol):
    """What a shard tells while it is written."""

    def begin(self, units: int) -> None:
        """A shard of so many units of work was begun."""

    def advance(self, units: int, skipped: int = 0) -> None:
        """So many more units are done, of which `skipped` could not be read."""


# Writes one shard: its number, its part of the source, and whom to tell how far it is.
Work = Callable[[int, Any, Progress], None]
# Has the work done for numbered parts of the source: here, or on other machines (valm/distributed.py).
Run = Callable[[Work, Iterable[tuple[int, Any]], Progress], None]


def run_here(work: Work, shards: Iterable[tuple[int, Any]], progress: Progress) -> None:
    """One shard after the other, in this process."""
    for number, part in shards:
        work(number, part, progress)


class ProgressBar:
    """Rate and time left over `shards` shards (None: nobody knows how many) whose sizes show only when they begin: the
    whole is guessed from those begun so far."""

    def __init__(self, description: str, unit: str, shards: int | None, shown: bool):
        self.shards = shards
        self._begun = self._expected = self._skipped = 0
        self._bar = tqdm(desc=description, unit=unit, unit_scale=True, disable=not shown)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def begin(self, units: int) -> None:
        self._begun += 1
        self._expected += units
        if self.shards is not None:
            self._bar.total = round(self._expected * self.shards / self._begun)

    def advance(self, units: int, skipped: int = 0) -> None:
        self._skipped += skipped
        if self._skipped:
            self._bar.set_postfix(skipped=self._skipped, refresh=False)
        self._bar.update(units)


class ShardedBuild:
    """A folder that is being filled with shards, or was.

    out: new, empty, or holding the build of the same plan, finished or not.
    what: what the folder is to be, for its errors. plan: everything the result depends on, as JSON.
    Raises ValmError where `out` holds something else, or cannot be written.
    """

    def __init__(self, out: str | Path, what: str, plan: dict[str, Any]):
        self.out = writable_folder(out)
        self.what = what
        self.plan = plan
        self.finished = (self.out / MANIFEST_FILE).exists()
        if self.finished:
            self._check_plan(read_json(self.out / MANIFEST_FILE, "the manifest"), f"already holds a {what}")
            self._remove_state()  # where it was killed between its last steps
        elif (self.out / BUILD_FILE).exists():
            state = read_json(self.out / BUILD_FILE, f"the state of an unfinished {what}")
            self._check_plan(state, f"holds an unfinished {what}")
        else:
            others = sorted(file.name for file in self.out.iterdir() if file.suffix != ".tmp")
            if others:
                raise ValmError(f"the output folder {self.out} is not empty (it has {others[0]}); choose another")
            write_json(self.out / BUILD_FILE, {"plan": plan})

    def done(self) -> dict[int, dict[str, Any]]:
        """The record of every shard that is whole, by its number."""
        if self.finished:
            return dict(enumerate(read_json(self.out / MANIFEST_FILE, "the manifest")["shards"]))
        files = sorted(self.out.glob("shard-*.json"))
        return {int(file.stem.partition("-")[2]): read_json(file, "the record of a shard") for file in files}

    def write(self, work: Work, parts: Iterable[Any], run: Run, progress: Progress) -> None:
        """Has those of `parts` (the parts of the source, shard by shard) written that are not there yet."""
        done = self.done()
        run(work, ((number, part) for number, part in enumerate(parts) if number not in done), progress)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes `manifest`, with the plan and the shards: from here on the folder is finished."""
        shards = [record for _, record in sorted(self.done().items())]
        write_json(self.out / MANIFEST_FILE, {**manifest, "plan": self.plan, "shards": shards})
        self.finished = True
        self._remove_state()

    def abandon(self) -> None:
        """Removes all that was written. Killed meanwhile, it is an unfinished build still."""
        files = [entry["name"] for record in self.done().values() for entry in record["files"]]
        # the records before what they say is there
        for file in self.out.glob("shard-*.json"):
            file.unlink()
        for name in files:
            (self.out / name).unlink(missing_ok=True)
        self._remove_state()

    def _remove_state(self) -> None:
        # temporary files of what was killed while it was written; that of an index, perhaps being built, is not ours
        for pattern in ("shard-*.json", "*-[0-9]*.tmp", f"{MANIFEST_FILE}.*.tmp", f"{BUILD_FILE}.*.tmp"):
            for file in self.out.glob(pattern):
                file.unlink(missing_ok=True)
        (self.out / BUILD_FILE).unlink(missing_ok=True)

    def _check_plan(self, found: Any, holds: str) -> None:
        before = found.get("plan") if isinstance(found, dict) else None
        if before == self.plan:
            return
        before = before if isinstance(before, dict) else {}
        names = sorted({*before, *self.plan})
        changed = ", ".join(name for name in names if before.get(name) != self.plan.get(name))
        advice = "choose another folder" if self.finished else "delete it or choose another folder"
        raise ValmError(f"{self.out} {holds} of another source or other settings ({changed} differ); {advice}")


class ShardFiles:
    """Writes the files of shard `number` into `out`, each whole or not there, and at the end its record."""

    def __init__(self, out: Path, number: int):
        self.out = out
        self.number = number
        self._files: list[dict[str, Any]] = []

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


def file_entry(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, as the manifest lists it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def files_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entry of every file that the manifest lists."""
    return (entry for shard in manifest["shards"] for entry in shard["files"])


def open_manifest(path: Path, what: str, version: int, command: str) -> dict[str, Any]:
    """The manifest of the folder `path`, which is a `what` of format `version` that `command` makes.

    Checks format, version and the size of every file. Raises ValmError, naming the file, where one is wrong.
    """
    if not path.is_dir():
        raise ValmError(f"no {what} at {path}: there is no such folder")
    if not (path / MANIFEST_FILE).exists():
        unfinished = (path / BUILD_FILE).exists()
        raise ValmError(
            f"the {what} {path} is unfinished; run `{command}` again, it goes on where it stopped"
            if unfinished
            else f"{path} is not a {what}: it has no {MANIFEST_FILE}; make one with `{command}`"
        )
    manifest = read_json(path / MANIFEST_FILE, "the manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != f"valm {what}":
        raise ValmError(f"{path / MANIFEST_FILE} is not the manifest of a {what}")
    if manifest.get("version") != version:
        raise ValmError(
            f"the {what} {path} has format version {manifest.get('version')}, this valm reads {version}; make it again"
        )
    for entry in files_of(manifest):
        file = path / entry["name"]
        found = file.stat().st_size if file.exists() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes instead of {entry['bytes']}"
            raise ValmError(f"the {what} {path} is damaged: {entry['name']} {state}; make it again")
    return manifest


def open_array(file: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The array in `file`, memory-mapped. Raises ValmError where it is not of this shape and type."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValmError(f"{file} is damaged: {error}; make it again") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValmError(f"{file} holds {array.dtype} {array.shape}, the manifest says {np.dtype(dtype)} {shape}")
    return array
