"""The manifest of a finished folder of shards: every file with its size and checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from valm.errors import ValmError
from valm.files import read_json

MANIFEST_FILE = "manifest.json"
# The plan of a folder that is not finished (`valm.shards.build`).
BUILD_FILE = "build.json"


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


def open_array(file: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """The array in `file`, memory-mapped. Raises ValmError where it is not of this shape and type."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValmError(f"{file} is damaged: {error}; make it again") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValmError(f"{file} holds {array.dtype} {array.shape}, the manifest says {np.dtype(dtype)} {shape}")
    return array
