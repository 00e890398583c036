"""Folders of numbered shards, written by one process or many, and resumed after any of them was killed.

    build.json          the plan: everything the result depends on; only while the folder is unfinished
    shard-00000.json    the record of shard 0, written when its files are complete; only while the folder is unfinished
    manifest.json       the plan, every shard with the checksums of its files, and a checksum of all this; only when the
                        folder is finished

A shard is the unit of work. It depends on the plan and on its own part of the source alone, so shards can be written in
any order and anywhere that sees the folder, and one that was begun twice is the same shard.

Manifests and records are not trusted: only `check_files` compares the names in them with the names that are written
here, and the files with their entries.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.progress import progress_bar
from valm.store.files import (
    WAIT_SECONDS,
    Count,
    Sha256,
    check,
    exists,
    is_folder,
    is_transient,
    read_json,
    writable_folder,
    write_json,
)
from valm.store.settings import check_same
from valm.text import one_line
from valm_kernels.atomic_files import atomic_path, folder_lock, is_temporary, remove_leftovers, sync_folder
from valm_kernels.checksums import file_sha256, json_sha256
from valm_kernels.json_files import check_own, short

MANIFEST_FILE = "manifest.json"
# The plan of a folder that is not finished.
BUILD_FILE = "build.json"
SHARD_FILE = re.compile("shard-[0-9]{5,9}\\.json")
# The names that `ShardFiles` writes: kind, number of the shard, suffix.
FILE_NAME = r"^[a-z_]+-[0-9]{5,9}\.(npy|parquet|json)$"
# Stores in a folder that an error names, if the folder itself is none.
BELOW_SHOWN = 8
DELETE = "delete it or choose another folder"


class FileEntry(TypedDict):
    """The entry of a file."""

    name: Annotated[str, Field(pattern=FILE_NAME)]
    bytes: Count
    sha256: Sha256


class ShardRecord(TypedDict):
    """The record of a shard of any content."""

    files: list[FileEntry]


class Plan(TypedDict):
    """A manifest, or the state of an unfinished folder, as far as all kinds agree."""

    plan: dict[str, Any]


class Manifest(Plan):
    """The manifest of a finished folder of any content."""

    format: str
    version: int
    shards: list[ShardRecord]
    sha256: Sha256


class Progress(Protocol):
    """Receives the progress of a shard."""

    def begin(self, units: int) -> None:
        """Reports that a shard of this many units of work was begun."""

    def advance(self, units: int, skipped: int = 0) -> None:
        """Reports that this many more units are done, of which `skipped` could not be read."""


# Writes one shard, given its number, its part of the source, and its progress.
Work = Callable[[int, Any, Progress], None]
# Runs the work for numbered parts of the source: here, or on other machines (valm/store/ray.py).
Runner = Callable[[Work, Iterable[tuple[int, Any]], Progress], None]


def run_here(work: Work, shards: Iterable[tuple[int, Any]], progress: Progress) -> None:
    """One shard after the other, in this process."""
    for number, part in shards:
        work(number, part, progress)


class ProgressBar:
    """Rate and time left over `shards` shards (None = unknown), whose sizes are known only once they begin: the total
    is estimated from those begun so far."""

    def __init__(self, description: str, unit: str, shards: int | None, shown: bool):
        self.shards = shards
        self._begun = self._expected = self._skipped = 0
        self._bar = progress_bar(desc=description, unit=unit, unit_scale=True, shown=shown)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
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
    """A folder of shards, finished or being written.

    Args:
        out: new, empty, or holding the build of the same plan, finished or not.
        what: what the folder will be, for errors.
        plan: everything the result depends on, as JSON.
        record: the schema of a shard's record.

    Raises:
        OSError: `out` cannot be written.
        ValmError: `out` holds something else.
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
            TimeoutError: another process is writing it.
        """
        with self._lock():
            self._look()
            yield

    def _lock(self) -> AbstractContextManager[None]:
        return folder_lock(self.out, WAIT_SECONDS)

    def _look(self) -> None:
        """Finds out whether the folder is finished, unfinished or new. A finished one does not change any more."""
        if self.finished:
            return
        if (self.out / MANIFEST_FILE).exists():
            manifest: Manifest = read_json(self.out / MANIFEST_FILE, "the manifest", Manifest)
            check_seal(manifest, self.out / MANIFEST_FILE)
            check_same(f"{self.out} holds another {self.what}", manifest["plan"], self.plan, "choose another folder")
            self._manifest = manifest
            self._remove_state()  # where it was killed between its last steps
        elif (self.out / BUILD_FILE).exists():
            state = read_json(self.out / BUILD_FILE, f"the state of an unfinished {self.what}", Plan, DELETE)
            check_same(f"{self.out} holds another unfinished {self.what}", state["plan"], self.plan, DELETE)
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
        check_files(self.out, records.items(), f"the unfinished {self.what}", DELETE)
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

    def link(self, folder: Path, entries: Iterable[FileEntry]) -> None:
        """The files `entries` of a shard in `folder`, which stay what they are, under the names of this shard: each the
        same file (a hard link), or a copy where the file system makes no links.

        Raises:
            OSError: one cannot be read or copied.
            ValmError: the copy of one is not what its entry says.
        """
        for entry in entries:
            kind, suffix = entry["name"].partition("-")[0], os.path.splitext(entry["name"])[1]
            source, path = folder / entry["name"], self.out / f"{kind}-{self.number:05d}{suffix}"
            path.unlink(missing_ok=True)  # of a run that was killed
            try:
                os.link(os.path.realpath(source), path)
            except OSError:  # another file system, one without links, or a file of somebody else
                with atomic_path(path) as temporary:
                    with open(source, "rb") as old, open(temporary, "wb") as new:  # copyfile would name the old one
                        shutil.copyfileobj(old, new)
                    check_content(source, entry, temporary)
            self._files.append({**entry, "name": path.name})
        sync_folder(self.out)

    def finish(self, **facts: Any) -> None:
        """The shard is whole: its record has `facts` and the checksums of its files."""
        write_json(self.out / f"shard-{self.number:05d}.json", {**facts, "files": self._files})


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, a JSON object, with the checksum of its other entries, which `check_seal` compares."""
    return {**content, "sha256": json_sha256(content)}


def check_seal(content: Mapping[str, Any], path: Path, remedy: str = "make it again") -> None:
    """Checks that `content`, read from `path`, is as `sealed` made it.

    Raises:
        ValmError: an entry has changed, or the checksum itself.
    """
    if content.get("sha256") != json_sha256(content):
        raise ValmError(f"{path} is damaged: it differs from its own checksum; {remedy}")


def file_entry(path: Path) -> FileEntry:
    """Name, size and SHA-256 of a file, as the manifest lists it."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def check_content(file: Path, entry: FileEntry, copy: Path | None = None) -> None:
    """Checks that the content of `file`, or of its `copy`, is what `entry` lists: before damage gets a new checksum.

    Raises:
        ValmError: it has changed.
    """
    if file_sha256(copy or file) != entry["sha256"]:
        raise ValmError(f"{file} is damaged: it does not match its checksum; make it again")


def files_of(manifest: Mapping[str, Any]) -> Iterator[FileEntry]:
    """The entry of every file that the manifest lists."""
    return (entry for shard in manifest["shards"] for entry in shard["files"])


def damaged_files(folder: Path, manifest: Mapping[str, Any], progress: bool) -> list[str]:
    """The names of those files whose content is not what the manifest of `folder` lists. Reads all."""
    bar = progress_bar(list(files_of(manifest)), desc="verify", unit=" files", shown=progress)
    return [entry["name"] for entry in bar if file_entry(folder / entry["name"]) != entry]


def check_files(folder: Path, shards: Iterable[tuple[int, Any]], what: str, remedy: str) -> None:
    """Checks the files that the records of `shards` (number, record) list.

    Raises:
        OSError: a file leads out of `folder`, or cannot be looked at.
        ValmError: one has another shard's name, repeats a kind, is missing, or has another size. The message begins
            with `what`.
    """
    for number, record in shards:
        kinds = set()
        for entry in record["files"]:
            name = entry["name"]
            kind, _, rest = name.partition("-")
            if int(rest.partition(".")[0]) != number or kind in kinds:
                raise ValmError(f"{what} {folder} is damaged: its shard {number} lists {name}; {remedy}")
            kinds.add(kind)
            try:
                size = check_own(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                raise ValmError(f"{what} {folder} is damaged: {name} is missing; {remedy}") from None
            if size != entry["bytes"]:
                found = f"{name} has {size} bytes instead of {entry['bytes']}"
                raise ValmError(f"{what} {folder} is damaged: {found}; {remedy}")


def open_manifest(path: Path, what: str, version: int, command: str, schema: type) -> dict[str, Any]:
    """The manifest of the folder `path`, which is a `what` of format `version` that `command` makes.

    Checks format, version, the rest of `schema` (a `Manifest`), its own checksum, and the name, kind and size of every
    file.

    Raises:
        OSError: it cannot be read.
        ValmError: a check failed; the message names the file.
    """
    file = path / MANIFEST_FILE
    if not exists(file):
        raise ValmError(_why_none(path, what, command))
    check_own(file)
    manifest: dict[str, Any] = read_json(file, "the manifest", dict[str, Any])
    if manifest.get("format") != f"valm {what}":
        raise ValmError(f"{file} is not the manifest of a {what}")
    if manifest.get("version") != version:
        found = short(manifest.get("version"))
        raise ValmError(f"the {what} {path} has format version {found}, this valm reads {version}; make it again")
    try:
        check(manifest, schema)
    except ValueError as error:
        raise ValmError(f"the manifest {file} is damaged: {error}; make it again with `{command}`") from error
    check_seal(manifest, file)
    check_files(path, enumerate(manifest["shards"]), f"the {what}", "make it again")
    return manifest


def _why_none(path: Path, what: str, command: str) -> str:
    """Why there is no manifest in `path`."""
    if not is_folder(path):
        return f"no {what} at {path}: there is no such folder"
    if exists(path / BUILD_FILE):
        return f"the {what} {path} is unfinished; run `{command}` again, it resumes where it stopped"
    below = [str(file.parent) for file in sorted(path.glob(f"*/{MANIFEST_FILE}")) if _is_of(file, what)][:BELOW_SHOWN]
    remedy = f"name one of those in it: {', '.join(below)}" if below else f"make one with `{command}`"
    return f"{path} is not a {what}: it has no {MANIFEST_FILE}; {remedy}"


def _is_of(manifest: Path, what: str) -> bool:
    """Whether it is the manifest of a `what`."""
    try:
        return read_json(manifest, "the manifest", dict[str, Any]).get("format") == f"valm {what}"
    except (OSError, ValmError):
        return False


def open_array(file: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.memmap:
    """The array in `file`, memory-mapped.

    Raises:
        OSError: it cannot be read.
        ValmError: it is damaged or has another shape or dtype.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many types for a damaged header
        if is_transient(error):
            raise
        raise ValmError(f"{file} is damaged: {one_line(str(error))}; make it again") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValmError(f"{file} holds {array.dtype} {array.shape}, the manifest says {np.dtype(dtype)} {shape}")
    return array
