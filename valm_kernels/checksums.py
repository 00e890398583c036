"""Checksums of files."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

BLOCK_BYTES = 1 << 22


def file_sha256(path: Path, size: int = sys.maxsize) -> str:
    """SHA-256 of a file's content, or of its first `size` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(BLOCK_BYTES, size)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
