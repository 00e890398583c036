"""The files of a store, and manifests that a test changes."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from valm.errors import ValmError
from valm.store.shards import sealed


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def edit_manifest(folder: Path, name: str = "manifest.json", **changes: Any) -> None:
    """Changes entries of the file `name` and its checksum, as anybody who may write the folder could."""
    file = folder / name
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | changes)))


def replacements(file: Path, outside: Path) -> Iterator[None]:
    """Replaces `file` by a pipe, a link to a device, and a link to its copy in the folder `outside`, one after the
    other: none of them is a regular file of its folder."""
    outside.mkdir()
    copy = outside / file.name
    file.rename(copy)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(copy)):
        make(file)
        yield
        file.unlink()


def check_every_bit_counts(file: Path, read: Callable[[], object], count: int) -> None:
    """Checks that `read` rejects the JSON `file` after a bit has changed its value; tries `count` bits."""
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), count, replace=False).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            read()
        except ValmError:
            continue
        assert json.loads(changed) == json.loads(whole), f"bit {bit}: {bytes(changed)!r}"
