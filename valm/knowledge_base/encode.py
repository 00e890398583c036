"""Encodes image files to CLIP vectors: worker processes decode the images, which are encoded in batches."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from valm.clip.clip import Clip
from valm.knowledge_base.format import Skipped
from valm.knowledge_base.records import Encoding, Record
from valm.store.files import cannot_read, is_transient
from valm.store.shards import Progress
from valm.text import one_line

# Fewer images are decoded in this process: starting workers would take longer.
WORKERS_FROM_IMAGES = 512
MAX_WORKERS = 8
# prctl(2), of Linux
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Decoded:
    """A worker's result for an image: its `row` of a knowledge base without the vector, or why it could not be read.

    Attributes:
        transient: whether the machine, not the image, is the reason (`is_transient`).
    """

    uri: str
    row: dict[str, Any] | None = None
    reason: str = ""
    transient: bool = False


def decoding_workers(images: int) -> int:
    """The number of processes that decode `images` images; 0 means this process."""
    # torch's threads, not the machine's cores: a Ray task has only some of the cores
    return min(torch.get_num_threads(), MAX_WORKERS) if images >= WORKERS_FROM_IMAGES else 0


class Encoded(NamedTuple):
    """The images of one shard for `image_table`; damaged images are skipped and listed."""

    rows: list[dict[str, Any]]
    vectors: np.ndarray  # (n, E) float32
    skipped: list[Skipped]


def encode_records(records: list[Record], clip: Clip, encoding: Encoding, progress: Progress) -> Encoded:
    """Decodes and encodes the images of `records`. Errors are those of `decoded_batches`."""
    progress.begin(len(records))
    vectors = [np.empty((0, clip.embed_dim), np.float32)]
    rows: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    for batch, pixels in decoded_batches(records, clip, encoding):
        if len(pixels):
            vectors.append(clip.encode_images(pixels).cpu().numpy())
        rows += [decoded.row for decoded in batch if decoded.row is not None]
        bad: list[Skipped] = [{"uri": one.uri, "reason": one.reason} for one in batch if one.row is None]
        skipped += bad
        progress.advance(len(batch), skipped=len(bad))
    return Encoded(rows, np.concatenate(vectors), skipped)


def decoded_batches(
    records: list[Record], clip: Clip, encoding: Encoding
) -> Iterator[tuple[list[Decoded], torch.Tensor]]:
    """The images of `records` in batches: each record's result, and the pixels (n, 3, H, W) of the readable images.

    Raises:
        ValmError: a transient error (`is_transient`) while an image is read.
    """
    workers = decoding_workers(len(records)) if encoding.workers is None else encoding.workers
    decode = partial(_decode, transform=clip.transform, thumbnails=encoding.thumbnails)
    dataset: Any = records  # a list is one
    for batch, pixels in DataLoader(
        dataset, encoding.batch_size, collate_fn=decode, num_workers=workers, worker_init_fn=end_with_parent
    ):
        for decoded in batch:
            if decoded.transient:
                raise cannot_read(decoded.uri, decoded.reason)
        yield batch, pixels


def _decode(records: list[Record], transform: Any, thumbnails: int) -> tuple[list[Decoded], torch.Tensor]:
    """Decodes a batch of images, with their pixels (n, 3, H, W). A DataLoader calls it in its worker processes."""
    found, pixels = [], []
    for record in records:
        row: dict[str, Any] = {"uri": record.uri, "caption": record.caption}
        try:
            image = record.read()
            row |= {"width": image.width, "height": image.height}
            row["jpeg"] = thumbnail_bytes(image, thumbnails) if thumbnails else None
            pixels.append(transform(image))
            found.append(Decoded(record.uri, row))
        except Exception as error:  # decoders raise many types for damaged bytes
            reason = one_line(str(error)) or type(error).__name__
            found.append(Decoded(record.uri, None, reason, is_transient(error)))
    return found, torch.stack(pixels) if pixels else torch.empty(0)


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of the image whose longer side is at most `size` pixels, without comments or other metadata."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90, comment=b"")  # Pillow would keep the original's comment
    return buffer.getvalue()


def end_with_parent(worker: int = 0) -> None:
    """Makes this process end when its parent is killed, on Linux. A DataLoader calls it in worker number `worker`.

    Otherwise PyTorch's workers may stay: other workers hold open the read ends of the pipes that they write to, so they
    wait forever for a reader.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # the parent was killed before prctl
        os._exit(1)
