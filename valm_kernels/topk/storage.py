"""Named arrays in a folder: one npy file each, and a manifest.json that lists the files and their checksums.

A file's name contains its checksum, so a save never touches the files of the previous save. Replacing the manifest
is the commit: before it the folder is the old index, after it the new index. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..atomic_files import (
    ABANDONED_SECONDS,
    SAVE_WAIT_SECONDS,
    folder_lock,
    move,
    remove_leftovers,
    sync_folder,
    temporary_file,
)
from ..checksums import file_sha256, json_sha256
from ..json_files import check_own, read_json, short

FORMAT = "valm flat inner-product index"
VERSION = 2
MANIFEST = "manifest.json"
# Files of other names are neither read nor deleted, even if a manifest lists them.
ARRAY_FILE = re.compile(r"[a-z_]+-[0-9a-f]{16}\.npy")
# The bytes that the native code loads at once.
ALIGNMENT = 64
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
TEMPORARY_FILE = re.compile(r"([a-z_]+|manifest\.json)\.[0-9a-f]{32}\.tmp")


class _HashingFile:
    """A file that also computes the checksum of the bytes that numpy writes to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.file.write(data)


def write_folder(path: Path, arrays: dict[str, np.ndarray], properties: dict[str, Any]) -> None:
    """Writes the arrays and the manifest, all or nothing, and removes what earlier saves left.

    Raises:
        OSError: writing failed, and the folder's old content is untouched; or another process is writing the folder.
        ValueError: the folder's manifest belongs to something else and is left as it is.
    """
    with ExitStack() as lock:
        written: list[Path] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.enter_context(folder_lock(path, SAVE_WAIT_SECONDS))
            _check_not_foreign(path / MANIFEST)
            old_files = _referenced_files(path)
            entries = {}
            for name, array in arrays.items():
                file, entry = _write_array(path, name, array, written)
                entries[name] = {"file": file.name, **entry}
            manifest = {"format": FORMAT, "version": VERSION, **properties, "arrays": entries}
            manifest["sha256"] = json_sha256(manifest)
            with temporary_file(path / MANIFEST) as temporary:
                temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
                move(temporary, path / MANIFEST)
        except BaseException:
            # an interruption may come after the commit
            committed = _referenced_files(path)
            _remove(file for file in written if file.name not in committed)
            raise
        sync_folder(path)
        files = {entry["file"] for entry in entries.values()}
        _remove(path / name for name in old_files - files)
        _remove(file for file in path.iterdir() if file.name not in files and _abandoned(file))
        remove_leftovers(path, TEMPORARY_FILE)


def _remove(files: Iterable[Path]) -> None:
    """Removes files if possible: extra files in the folder do no harm."""
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _abandoned(file: Path) -> bool:
    """Whether an interrupted save left this file, which has no lock. Another process may still use a recent file."""
    if not ARRAY_FILE.fullmatch(file.name):
        return False
    try:
        return time.time() - file.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:  # another process was faster
        return False


def _write_array(path: Path, name: str, array: np.ndarray, written: list[Path]) -> tuple[Path, dict[str, Any]]:
    with temporary_file(path / name) as temporary:
        with temporary.open("wb") as file:
            hashing = _HashingFile(file)
            np.lib.format.write_array(hashing, array, allow_pickle=False)
        sha256 = hashing.sha256.hexdigest()
        final = path / f"{name}-{sha256[:16]}.npy"
        if not final.exists():  # the same content under the old manifest must outlive a failure
            written.append(final)
        move(temporary, final)
    return final, {"bytes": final.stat().st_size, "sha256": sha256}


def _check_not_foreign(manifest: Path) -> None:
    """Checks that a save does not replace the manifest of something else, such as a knowledge base.

    Raises:
        ValueError: it would.
    """
    try:
        found = read_json(manifest)
    except (OSError, ValueError):  # a missing or damaged manifest may be replaced
        return
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{manifest} belongs to something else, not to a {FORMAT}: save to another folder")


def _referenced_files(path: Path) -> set[str]:
    """Files of the index in the folder; none if this version cannot read it."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError):
        return set()
    return {entry["file"] for entry in manifest["arrays"].values()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a saved folder.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the manifest is damaged or of another version; the message says what is wrong.
    """
    file = path / MANIFEST
    if not file.exists():
        raise FileNotFoundError(f"{path} is not a saved index: it has no {MANIFEST}")
    check_own(file)
    manifest: dict[str, Any] = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe a {FORMAT}")
    version = manifest.get("version")
    if version != VERSION:
        raise ValueError(
            f"{file} has format version {short(version)}, this code reads version {VERSION}: save the index again from "
            "its vectors"
        )
    if manifest.get("sha256") != json_sha256(manifest):
        raise ValueError(f"{file} is damaged: it differs from its own checksum")
    for name, entry in manifest["arrays"].items():
        named = f"{name}-{entry['sha256'][:16]}.npy"
        if entry["file"] != named or not ARRAY_FILE.fullmatch(named):
            raise ValueError(f"{file} is damaged: its array {name!r} is in {short(entry['file'])}, expected {named}")
    return manifest


def _read_aligned(file: Path) -> np.ndarray:
    """The array in an npy file, in memory that begins at a multiple of ALIGNMENT, which numpy's reader does not do:
    64 queries against codes at 16 mod 64 took 97 ms instead of 74 (Xeon with VNNI)."""
    with file.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = _HEADERS[version](stream)
        size = math.prod(shape) * dtype.itemsize
        if fortran_order or dtype.hasobject or stream.tell() + size != file.stat().st_size:
            raise ValueError(f"its header says {dtype} of shape {shape}")
        buffer = np.empty(size + ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT
        stream.readinto(buffer[start : start + size].data)
        return buffer[start : start + size].view(dtype).reshape(shape)


class MissingFile(ValueError):
    """An array that the manifest lists is not there."""


class Folder:
    """An opened folder, whose arrays are memory-mapped or read, and with `verify` compared with their checksums.

    Raises:
        FileNotFoundError: there is no saved folder.
        ValueError: the folder is damaged; the methods raise this too.
    """

    def __init__(self, path: Path, *, mmap: bool, verify: bool) -> None:
        self.path, self.mmap, self.verify = path, mmap, verify
        self.manifest_path = path / MANIFEST
        self._manifest = read_manifest(path)

    def __contains__(self, name: str) -> bool:
        return name in self._manifest["arrays"]

    def replaced(self) -> bool:
        """Whether another index has been saved here since this folder was opened, so that its files are gone."""
        return read_manifest(self.path) != self._manifest

    @property
    def dtype(self) -> str:
        return str(self._manifest["dtype"])

    @property
    def shape(self) -> tuple[int, int]:
        """Number and width of the rows."""
        return self._manifest["count"], self._manifest["dim"]

    def read(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Reads one array and checks its dtype and shape; None stands for any size."""
        if name not in self:
            raise ValueError(f"{self.manifest_path} is damaged: it lists no array {name!r}")
        entry = self._manifest["arrays"][name]
        try:
            return self._read(entry, dtype, shape)
        except FileNotFoundError:  # another index was saved meanwhile
            raise MissingFile(f"{self.path} is damaged: {entry['file']} is missing") from None

    def _read(self, entry: dict[str, Any], dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
        file = self.path / entry["file"]
        size = check_own(file).st_size
        if size != entry["bytes"]:
            raise ValueError(f"{file} is damaged: it has {size} bytes, expected {entry['bytes']}")
        if self.verify and file_sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} is damaged: its checksum differs from the one saved in {MANIFEST}")
        array = self._load(file)
        fits = len(array.shape) == len(shape) and all(b in (a, None) for a, b in zip(array.shape, shape, strict=True))
        if not fits or array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
            raise ValueError(
                f"{file} holds {array.dtype} of shape {array.shape}, expected contiguous {np.dtype(dtype)} of shape "
                f"{shape}"
            )
        return array

    def _load(self, file: Path) -> np.ndarray:
        try:
            if self.mmap:  # copy-on-write, because torch needs writable memory
                return np.lib.format.open_memmap(file, mode="c")
            return _read_aligned(file)
        except OSError:
            raise
        except Exception as error:  # a damaged header makes numpy raise more than ValueError
            raise ValueError(f"{file} is damaged, it is not an npy file: {error}") from error
