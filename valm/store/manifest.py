"""The manifest of a finished folder of shards: every file with its size and checksum, and a checksum of its own.

Manifests and records are not trusted: only `check_files` compares the names in them with the names that are written
here, and the files with their entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt

from valm.errors import ValmError
from valm.progress import progress_bar
from valm.store.files import exists, is_folder, is_transient, read_json
from valm.text import one_line
from valm_kernels.checksums import file_sha256, json_sha256
from valm_kernels.json_files import Count, Matching, SchemaError, Sha256, check, own_file, short

MANIFEST_FILE = "manifest.json"
# The plan of a folder that is not finished (`valm.store.shards`).
BUILD_FILE = "build.json"
# Stores in a folder that an error names, if the folder itself is none.
BELOW_SHOWN = 8
# The names that `ShardFiles` writes: kind, number of the shard, suffix.
FILE_NAME = r"[a-z_]+-[0-9]{5,9}\.(npy|parquet|json)"


class FileEntry(TypedDict):
    """The entry of a file."""

    name: Annotated[str, Matching(FILE_NAME, "a name such as vectors-00000.npy")]
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


def files_of(manifest: Mapping[str, Any]) -> Iterator[FileEntry]:
    """The entry of every file that the manifest lists."""
    return (entry for shard in manifest["shards"] for entry in shard["files"])


def damaged_files(folder: Path, manifest: Mapping[str, Any], progress: bool) -> list[str]:
    """The names of those files whose content is not what the manifest of `folder` lists. Reads all."""
    bar = progress_bar(list(files_of(manifest)), desc="verify", unit=" files", shown=progress)
    return [entry["name"] for entry in bar if file_entry(folder / entry["name"]) != entry]


def kinds_of(record: ShardRecord) -> set[str]:
    """The kinds of files that a shard has."""
    return {entry["name"].partition("-")[0] for entry in record["files"]}


def check_files(folder: Path, shards: Iterable[tuple[int, ShardRecord]]) -> None:
    """Checks the files that the records of `shards` (number, record) list.

    Raises:
        ValueError: a file has another shard's name, repeats a kind, is missing, leads out of `folder`, is not a regular
            file, or has another size.
    """
    for number, record in shards:
        kinds = set()
        for entry in record["files"]:
            name = entry["name"]
            kind, _, rest = name.partition("-")
            if int(rest.partition(".")[0]) != number or kind in kinds:
                raise ValueError(f"its shard {number} lists {name}")
            kinds.add(kind)
            try:
                size = own_file(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                raise ValueError(f"{name} is missing") from None
            if size != entry["bytes"]:
                raise ValueError(f"{name} has {size} bytes instead of {entry['bytes']}")


def open_manifest(path: Path, what: str, version: int, command: str, schema: type) -> dict[str, Any]:
    """The manifest of the folder `path`, which is a `what` of format `version` that `command` makes.

    Checks format, version, the rest of `schema` (a `Manifest`), its own checksum, and the name, kind and size of every
    file.

    Raises:
        ValmError: a check failed; the message names the file.
    """
    if not is_folder(path):
        raise ValmError(f"no {what} at {path}: there is no such folder")
    if not exists(path / MANIFEST_FILE):
        if (path / BUILD_FILE).exists():
            raise ValmError(f"the {what} {path} is unfinished; run `{command}` again, it resumes where it stopped")
        below = _stores_below(path, what)
        remedy = f"name one of those in it: {', '.join(below)}" if below else f"make one with `{command}`"
        raise ValmError(f"{path} is not a {what}: it has no {MANIFEST_FILE}; {remedy}")
    try:
        own_file(path / MANIFEST_FILE)
    except ValueError as error:
        raise ValmError(f"the {what} {path} is damaged: {error}") from error
    manifest: dict[str, Any] = read_json(path / MANIFEST_FILE, "the manifest", Any)
    if not isinstance(manifest, dict) or manifest.get("format") != f"valm {what}":
        raise ValmError(f"{path / MANIFEST_FILE} is not the manifest of a {what}")
    if manifest.get("version") != version:
        found = short(manifest.get("version"))
        raise ValmError(f"the {what} {path} has format version {found}, this valm reads {version}; make it again")
    try:
        check(manifest, schema)
    except SchemaError as error:
        raise ValmError(
            f"the manifest {path / MANIFEST_FILE} is damaged, it is not what `{command}` writes: {error}; make it again"
        ) from error
    check_seal(manifest, path / MANIFEST_FILE)
    try:
        check_files(path, enumerate(manifest["shards"]))
    except OSError as error:
        raise ValmError(f"cannot read the {what} {path}: {error}") from error
    except ValueError as error:
        raise ValmError(f"the {what} {path} is damaged: {error}; make it again") from error
    return manifest


def _stores_below(path: Path, what: str) -> list[str]:
    """The folders in `path` whose manifest is that of a `what`, at most BELOW_SHOWN."""
    found = []
    for file in sorted(path.glob(f"*/{MANIFEST_FILE}")):
        with suppress(ValmError):
            manifest = read_json(file, "the manifest", dict[str, Any])
            if manifest.get("format") == f"valm {what}":
                found.append(str(file.parent))
    return found[:BELOW_SHOWN]


def open_array(file: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.memmap:
    """The array in `file`, memory-mapped.

    Raises:
        ValmError: it is damaged or has another shape or dtype.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many types for a damaged header
        if is_transient(error):
            raise ValmError(f"cannot read {file}: {error}") from error
        raise ValmError(f"{file} is damaged: {one_line(str(error))}; make it again") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValmError(f"{file} holds {array.dtype} {array.shape}, the manifest says {np.dtype(dtype)} {shape}")
    return array
