"""Folders of numbered shards, written by one process or many, and resumed after a process was killed.

    build.json           the plan: everything the result depends on; only while the folder is unfinished
    shard-00000.arrow    a table of one record batch in Arrow's file format, memory-mapped when read
    shard-00000.json     the record of the shard: its size and checksum, a hash of its source, and facts that the kind
                         of folder adds; only while the folder is unfinished
    manifest.json        the plan, the record of every shard, and a checksum of both; only in a finished folder

A shard is the unit of work. It depends only on the plan and on its part of the source. So shards can be written in any
order, on any machine that sees the folder, and a shard that was begun twice is the same shard.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.progress import progress_bar
from valm.store.files import (
    WAIT_SECONDS,
    Count,
    Sha256,
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
BUILD_FILE = "build.json"
DELETE = "delete it or choose another folder"


class ShardRecord(TypedDict):
    """The entries that the record of every shard contains."""

    content: str
    bytes: Count
    sha256: Sha256


class Plan(TypedDict):
    """The content of BUILD_FILE, which is also a part of the manifest."""

    plan: dict[str, Any]


class Manifest(Plan):
    """The entries that the manifest of every finished folder contains."""

    format: str
    version: int
    shards: list[ShardRecord]
    sha256: Sha256


class Progress(Protocol):
    """Receives the progress of a shard."""

    def begin(self, units: int) -> None:
        """Reports that a shard with this many units of work was begun."""

    def advance(self, units: int, skipped: int = 0) -> None:
        """Reports that this many more units are done, of which `skipped` could not be read."""


class Part(NamedTuple):
    """The source of one shard: `source`, which can be pickled, and a hash of its `content`."""

    content: str
    source: Any


# Makes a shard's table from its part's source, and further entries for its record.
Work = Callable[[Any, Progress], tuple[pa.Table, dict[str, Any]]]
# Writes a numbered part, here or on another machine (valm/store/ray.py).
Task = Callable[[int, Part, Progress], None]
Runner = Callable[[Task, Iterable[tuple[int, Part]], Progress], None]


def run_here(task: Task, parts: Iterable[tuple[int, Part]], progress: Progress) -> None:
    """Writes one shard after the other, in this process."""
    for number, part in parts:
        task(number, part, progress)


class ProgressBar:
    """Shows rate and time left over `shards` shards (None = unknown), of which `done` were written before. A shard's
    size is known only when it begins, so the total is estimated from the shards begun so far."""

    def __init__(self, description: str, unit: str, shards: int | None, shown: bool):
        self.shards = shards
        self.done = self._begun = self._expected = self._skipped = 0
        self._bar = progress_bar(desc=description, unit=unit, unit_scale=True, shown=shown)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, units: int) -> None:
        self._begun += 1
        self._expected += units
        if self.shards is not None:
            self._bar.total = round(self._expected * (self.shards - self.done) / self._begun)

    def advance(self, units: int, skipped: int = 0) -> None:
        self._skipped += skipped
        if self._skipped:
            self._bar.set_postfix(skipped=self._skipped, refresh=False)
        self._bar.update(units)


@contextmanager
def sharded_build(
    out: str | os.PathLike, what: str, plan: dict[str, Any], record: type = ShardRecord
) -> Iterator[ShardedBuild]:
    """The folder `out`, locked, in which the block writes shards.

    Args:
        out: a new or empty folder, or a build of the same plan, finished or not.
        what: what the folder will be, for errors.
        plan: everything the result depends on except the content of the source, as JSON.
        record: the schema of a shard's record, a `ShardRecord`.

    Raises:
        OSError: `out` cannot be written, or (TimeoutError) another process is writing it.
        ValmError: `out` holds something else.
    """
    folder = writable_folder(out)
    with folder_lock(folder, WAIT_SECONDS):
        yield ShardedBuild(folder, what, plan, record)


class ShardedBuild:
    """A folder of shards, finished or being written. Arguments and errors are those of `sharded_build`, which locks it.

    since: when an existing plan was written, in seconds since 1970; None in a new folder.
    """

    def __init__(self, out: Path, what: str, plan: dict[str, Any], record: type):
        self.out, self.what, self.plan, self.record = out, what, plan, record
        self.finished = (out / MANIFEST_FILE).exists()
        before = out / (MANIFEST_FILE if self.finished else BUILD_FILE)
        self.since = before.stat().st_mtime if before.exists() else None
        if self.finished:
            manifest = read_manifest(out, Plan)
            check_seal(manifest, out / MANIFEST_FILE)
            # before the schema check, which records of another version would fail
            check_same(f"{out} holds another {what}", manifest["plan"], plan, "choose another folder")
            self._finished_records = dict(enumerate(read_manifest(out, Manifest)["shards"]))
            self._remove_state()  # if the build was killed between its last steps
        elif self.since is not None:
            check_own(out / BUILD_FILE)
            state = read_json(out / BUILD_FILE, f"the state of an unfinished {what}", Plan, DELETE)
            check_same(f"{out} holds another unfinished {what}", state["plan"], plan, DELETE)
        else:
            remove_leftovers(out)
            if others := sorted(file.name for file in out.iterdir() if not is_temporary(file.name)):
                raise ValmError(f"the output folder {out} is not empty (it contains {others[0]}): choose another")
            write_json(out / BUILD_FILE, {"plan": plan})

    def done(self) -> dict[int, dict[str, Any]]:
        """The record of every finished shard, by number. Raises ValmError if a record or shard is damaged."""
        if self.finished:
            return self._finished_records
        records = {}
        for file in sorted(self.out.glob("shard-*.json")):
            check_own(file)
            records[_number(file)] = read_json(file, "the record of a shard", self.record, DELETE)
        _check_sizes(self.out, records, f"the unfinished {self.what}", DELETE)
        return records

    def link(self, shards: Iterable[tuple[Path, Mapping[str, Any]]]) -> None:
        """Takes shards of other folders, each a file with its record, as the first shards: as hard links, or as copies
        if the file system has no links."""
        done = self.done()
        for number, (file, record) in enumerate(shards):
            if number in done:
                continue
            target = shard_file(self.out, number)
            target.unlink(missing_ok=True)  # left by a killed run
            try:
                os.link(file.resolve(), target)
            except OSError:  # another file system, a file system without links, or another user's file
                with atomic_path(target) as temporary:
                    shutil.copyfile(file, temporary)
            sync_folder(self.out)
            write_json(_record_file(self.out, number), record)

    def write(self, work: Work, parts: Iterable[Part], run: Runner, bar: ProgressBar, first: int = 0) -> None:
        """Writes the missing shards. `parts` is the whole source, whose first part is shard number `first`.

        Raises:
            ValmError: a part has changed since its shard was written.
        """
        bar.done = len(self.done())
        run(partial(write_shard, self.out.absolute(), work), self._missing(parts, first), bar)

    def _missing(self, parts: Iterable[Part], first: int) -> Iterator[tuple[int, Part]]:
        done, end = self.done(), first
        for end, part in enumerate(parts, first + 1):
            number = end - 1
            if number not in done and not self.finished:
                yield number, part
            elif done.get(number, {}).get("content") != part.content:
                raise self._changed(number)
        if end <= max(done, default=-1):
            raise self._changed(end)

    def _changed(self, number: int) -> ValmError:
        return ValmError(
            f"the source of the {self.what} has changed since {self.out} was begun (its part {number}); choose another "
            "folder"
        )

    def finish(self, **manifest: Any) -> None:
        """Finishes the folder: writes the manifest with these entries, the plan and the records."""
        shards = [record for _, record in sorted(self.done().items())]
        whole = {"format": f"valm {self.what}", **manifest, "plan": self.plan, "shards": shards}
        write_json(self.out / MANIFEST_FILE, sealed(whole))
        self._remove_state()

    def abandon(self) -> None:
        """Removes everything that was written. If killed meanwhile, the folder is still an unfinished build."""
        for file in sorted(self.out.glob("shard-*"), reverse=True):  # a record before its table
            file.unlink()
        self._remove_state()

    def _remove_state(self) -> None:
        for file in self.out.glob("shard-*.json"):
            file.unlink(missing_ok=True)
        remove_leftovers(self.out)
        (self.out / BUILD_FILE).unlink(missing_ok=True)


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard's table."""
    return folder / f"shard-{number:05d}.arrow"


def _record_file(folder: Path, number: int) -> Path:
    return shard_file(folder, number).with_suffix(".json")


def _number(file: Path) -> int:
    return int(file.stem.partition("-")[2])


def write_shard(out: Path, work: Work, number: int, part: Part, progress: Progress) -> None:
    """A task that writes shard `number` in the folder `out`."""
    table, facts = work(part.source, progress)
    file = shard_file(out, number)
    with atomic_path(file) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table.combine_chunks())
    checked = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(_record_file(out, number), {"content": part.content, **facts, **checked})


def read_shard(file: Path, schema: pa.Schema, rows: int, nullable: Collection[str] = ()) -> pa.Table:
    """The table of a shard, memory-mapped; no file stays open.

    Args:
        schema: the columns to read; the shard may contain more.
        rows: the number of rows in its record.
        nullable: the columns that may contain nulls.

    Raises:
        OSError: the file cannot be read, is a link out of its folder or not a regular file.
        ValmError: the file is damaged, or has other columns, another number of rows or unexpected nulls.
    """
    check_own(file)
    try:
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            found = pa.schema([field for field in reader.schema if field.name in schema.names])
            if not found.equals(schema):
                raise ValueError(f"it has {reader.schema}, expected {schema}")
            # if pyarrow chooses columns itself, it copies them instead of mapping them
            table = reader.read_all().select(schema.names)
        table.validate(full=True)  # otherwise damaged offsets would be followed
        if len(table) != rows or reader.num_record_batches > 1:
            raise ValueError(f"it has {len(table)} rows, expected {rows} in one batch")
        for name in schema.names:
            if name not in nullable and _has_nulls(column_of(table, name)):
                raise ValueError(f"its {name} contains nulls")
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: for example names that are not UTF-8
        if is_transient(error):
            raise
        raise ValmError(f"{file} is damaged: {one_line(str(error))}; make it again") from error
    return table


def _has_nulls(array: pa.Array) -> bool:
    """Whether `array` or its lists contain nulls."""
    return array.null_count > 0 or (pa.types.is_nested(array.type) and _has_nulls(array.values))


def column_of(table: pa.Table, name: str) -> pa.Array:
    """A column of a shard, without a copy."""
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, a JSON object, with a checksum of its entries, which `check_seal` compares."""
    return {**content, "sha256": json_sha256(content)}


def check_seal(content: Mapping[str, Any], path: Path, remedy: str = "make it again") -> None:
    """Raises ValmError if `content`, read from `path`, has changed since `sealed`."""
    if content.get("sha256") != json_sha256(content):
        raise ValmError(f"{path} is damaged: it differs from its own checksum; {remedy}")


def totals(records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, int]:
    """The sum over all records of each entry in `names`."""
    records = list(records)
    return {name: sum(record[name] for record in records) for name in names}


def damaged_files(folder: Path, manifest: Mapping[str, Any], progress: bool) -> list[str]:
    """The names of files whose content differs from the manifest of `folder`. Reads all files."""
    records = manifest["shards"]
    bar = progress_bar(enumerate(records), total=len(records), desc="verify", unit=" files", shown=progress)
    files = ((shard_file(folder, number), record) for number, record in bar)
    return [file.name for file, record in files if check_own(file) and file_sha256(file) != record["sha256"]]


def _check_sizes(folder: Path, records: Mapping[int, Mapping[str, Any]], what: str, remedy: str) -> None:
    for number, record in records.items():
        file = shard_file(folder, number)
        try:
            size = check_own(file).st_size
        except FileNotFoundError:
            raise ValmError(f"{what} {folder} is damaged: {file.name} is missing; {remedy}") from None
        if size != record["bytes"]:
            found = f"{file.name} has {size} bytes instead of {record['bytes']}"
            raise ValmError(f"{what} {folder} is damaged: {found}; {remedy}")


def read_manifest(folder: Path, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """The manifest of `folder`, which contains its own checksum.

    Raises:
        OSError: the manifest cannot be read, or is a link out of its folder or not a regular file.
        ValmError: the manifest is not JSON or does not match the schema.
    """
    check_own(folder / MANIFEST_FILE)
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE, "the manifest", schema)
    return manifest


def open_manifest(
    path: Path, what: str, version: int, command: str, schema: type = Manifest, sums: Sequence[str] = ()
) -> dict[str, Any]:
    """The manifest of the folder `path`, a `what` of format `version` made by `command`.

    Checks format, version, `schema` (a `Manifest`), the checksum, the entries `sums` against the sums over all shards,
    and the size of every file.

    Raises:
        OSError: the manifest cannot be read, or a file is a link out of the folder or not a regular file.
        ValmError: a check failed; the message names the file.
    """
    if not path.is_dir():
        raise ValmError(f"no {what} at {path}: there is no such folder")
    if not (path / MANIFEST_FILE).exists():
        if (path / BUILD_FILE).exists():
            raise ValmError(f"the {what} {path} is unfinished: run `{command}` again, it resumes where it stopped")
        raise ValmError(f"{path} is not a {what}: it has no {MANIFEST_FILE}. Make one with `{command}`")
    noted = read_manifest(path)
    if noted.get("format") != f"valm {what}":
        raise ValmError(f"{path / MANIFEST_FILE} is not the manifest of a {what}")
    if (found := noted.get("version")) != version:
        raise ValmError(
            f"the {what} {path} has format version {short(found)}, this valm reads {version}; make it again"
        )
    manifest = read_manifest(path, schema)
    check_seal(manifest, path / MANIFEST_FILE)
    for name, total in totals(manifest["shards"], sums).items():
        if manifest[name] != total:
            raise ValmError(
                f"the manifest {path / MANIFEST_FILE} is damaged: its {name} is {manifest[name]}, the sum over its "
                f"shards is {total}; make it again"
            )
    _check_sizes(path, dict(enumerate(manifest["shards"])), f"the {what}", "make it again")
    return manifest
