"""The files of a store, and manifests that a test changes."""

import json
from pathlib import Path
from typing import Any

from valm.store.shards import sealed


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def edit_manifest(folder: Path, name: str = "manifest.json", **changes: Any) -> None:
    """Changes entries of the file `name`, with a checksum that agrees, as whoever may write the folder could."""
    file = folder / name
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | changes)))
