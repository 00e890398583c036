"""Encodes image files to CLIP vectors: decoded in worker processes, encoded in batches."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from valm.clip.clip import Clip
from valm.knowledge_base.format import ITEM_SCHEMA, EncodedShard, Skipped
from valm.knowledge_base.records import Encoding, Record
from valm.store.files import cannot_read, is_transient
from valm.store.shards import Progress
from valm.text import one_line

# Fewer images than this are decoded in this process: starting workers would take longer.
WORKERS_FROM_IMAGES = 512
MAX_WORKERS = 8
# prctl(2), of Linux
PR_SET_PDEATHSIG = 1


@dataclass
class Decoded:
    """A worker's result for record `index`. The record is not sent back, as it may hold the bytes of its image.

    Attributes:
        reason: why the image could not be read.
        transient: whether the machine, not the image, is the reason (`is_transient`).
    """

    index: int
    reason: str = ""
    transient: bool = False
    pixels: torch.Tensor | None = None  # (3, H, W), until the batch is stacked
    width: int = 0
    height: int = 0
    thumbnail: bytes | None = None


def decoding_workers(images: int) -> int:
    """How many processes decode so many images, 0 for this one."""
    # torch's threads, not the machine's cores: a Ray task has only some of those
    return min(torch.get_num_threads(), MAX_WORKERS) if images >= WORKERS_FROM_IMAGES else 0


def encode_records(records: list[Record], clip: Clip, encoding: Encoding, progress: Progress) -> EncodedShard:
    """Decodes and encodes the images of `records`; damaged ones are skipped and listed.

    Raises:
        ValmError: a transient error (`is_transient`) while an image is read.
    """
    progress.begin(len(records))
    vectors = [np.empty((0, clip.embed_dim), np.float32)]
    items: list[dict[str, Any]] = []
    thumbnails: list[bytes] = []
    skipped: list[Skipped] = []
    for batch, pixels in decoded_batches(records, clip, encoding):
        if len(pixels):
            vectors.append(clip.encode_images(pixels).cpu().numpy())
        for decoded in batch:
            record = records[decoded.index]
            if decoded.reason:
                skipped.append({"uri": record.uri, "reason": decoded.reason})
                continue
            size = {"width": decoded.width, "height": decoded.height}
            items.append({"uri": record.uri, "caption": record.caption, **size})
            if decoded.thumbnail is not None:
                thumbnails.append(decoded.thumbnail)
        progress.advance(len(batch), skipped=sum(bool(decoded.reason) for decoded in batch))
    table = pa.Table.from_pylist(items, schema=ITEM_SCHEMA)
    return EncodedShard(np.concatenate(vectors), table, thumbnails if encoding.thumbnails else None, skipped)


def decoded_batches(
    records: list[Record], clip: Clip, encoding: Encoding
) -> Iterator[tuple[list[Decoded], torch.Tensor]]:
    """The images of `records` by batches: each record's result, and the pixels (n, 3, H, W) of those that can be read.

    Raises:
        ValmError: a transient error (`is_transient`) while an image is read.
    """
    workers = decoding_workers(len(records)) if encoding.workers is None else encoding.workers
    decoder = _Decoder(records, clip, encoding.thumbnails)
    loader = DataLoader(
        decoder, encoding.batch_size, collate_fn=_collate, num_workers=workers, worker_init_fn=end_with_parent
    )
    for batch, pixels in loader:
        for decoded in batch:
            if decoded.transient:
                raise cannot_read(records[decoded.index].uri, decoded.reason)
        yield batch, pixels


class _Decoder(Dataset):
    """Decodes records; a DataLoader calls it in its worker processes."""

    def __init__(self, records: list[Record], clip: Clip, thumbnails: int):
        self.records = records
        self.transform = clip.transform
        self.thumbnails = thumbnails

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Decoded:
        record = self.records[index]
        try:
            image = record.read()
            decoded = Decoded(index, pixels=self.transform(image), width=image.width, height=image.height)
            if self.thumbnails:
                decoded.thumbnail = thumbnail_bytes(image, self.thumbnails)
            return decoded
        except Exception as error:  # decoders raise many types for damaged bytes
            return Decoded(index, one_line(str(error)) or type(error).__name__, is_transient(error))


def _collate(batch: list[Decoded]) -> tuple[list[Decoded], torch.Tensor]:
    """Stacks the decoded images, (n, 3, H, W): one tensor per image would cost one file descriptor each."""
    pixels = [decoded.pixels for decoded in batch if decoded.pixels is not None]
    for decoded in batch:
        decoded.pixels = None
    return batch, torch.stack(pixels) if pixels else torch.empty(0)


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of the image whose longer side is at most `size` pixels."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def end_with_parent(worker: int = 0) -> None:
    """Makes this process end when its parent is killed. A DataLoader calls it in worker number `worker`.

    PyTorch's own workers may stay: they write to pipes whose read ends other workers hold open too, so they wait
    forever for a reader.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # the main process itself
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent.pid:  # the parent was killed before that
            os._exit(1)
    else:

        def wait() -> None:
            parent.join()  # on a pipe that closes with it
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
