"""Checksums of files, and of JSON objects that contain their own checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 22
SHA256_BYTES = 32


def file_sha256(path: Path, *, omit: int = 0) -> str:
    """SHA-256 of a file's content without its last `omit` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = max(0, os.fstat(file.fileno()).st_size - omit)
        while block := file.read(min(BLOCK_BYTES, left)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its own entry "sha256", whatever the order of its keys."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
