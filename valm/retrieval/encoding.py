"""From pictures in files to CLIP vectors: decoding in worker processes, encoding in batches."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from valm.retrieval.clip import Clip
from valm.retrieval.pictures import one_line, read_picture, thumbnail_bytes
from valm.retrieval.sharded_build import Progress
from valm.retrieval.shards import ITEM_SCHEMA, Piece

# Below this many pictures they are decoded in this process: starting others takes longer.
WORKERS_FROM_PICTURES = 512
MAX_WORKERS = 8


@dataclass(frozen=True)
class Record:
    """One picture of a source.

    source: a file, of which the picture is the whole or `size` bytes from `offset` (a member of a tar file); the
        content of a file; a PIL picture; or None, where the source has no picture in its place.
    """

    uri: str
    caption: str
    source: Path | bytes | Image.Image | None
    offset: int = 0
    size: int | None = None

    def read(self) -> Image.Image:
        """The picture as `read_picture` gives it. Raises anything where it cannot be read."""
        if isinstance(self.source, Path):
            with open(self.source, "rb") as file:
                file.seek(self.offset)
                return read_picture(io.BytesIO(file.read(self.size)))
        if self.source is None:
            raise ValueError("there is no picture")
        return read_picture(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)


@dataclass
class _Decoded:
    """What a worker made of a record; `reason` says why it could not read the picture."""

    record: Record
    reason: str = ""
    pixels: torch.Tensor | None = None  # (3, H, W), until it is joined with the rest of the batch
    width: int = 0
    height: int = 0
    thumbnail: bytes | None = None


def encode_records(
    records: list[Record], clip: Clip, batch_size: int, thumbnails: int, workers: int | None, progress: Progress
) -> Piece:
    """Decodes and encodes the pictures of `records`; arguments as in `build_from_folder`."""
    if workers is None:
        # torch's threads and not the machine's cores: of those a Ray task has only some
        workers = min(torch.get_num_threads(), MAX_WORKERS) if len(records) >= WORKERS_FROM_PICTURES else 0
    progress.begin(len(records))
    vectors, items, small, skipped = [np.empty((0, clip.embed_dim), np.float32)], [], [], []
    decoder = _Decoder(records, clip, thumbnails)
    for batch, pixels in DataLoader(decoder, batch_size, collate_fn=_collate, num_workers=workers):
        if len(pixels):
            vectors.append(clip.encode_images(pixels).cpu().numpy())
        for decoded in batch:
            record = decoded.record
            if decoded.reason:
                skipped.append({"uri": record.uri, "reason": decoded.reason})
                continue
            size = {"width": decoded.width, "height": decoded.height}
            items.append({"uri": record.uri, "caption": record.caption, **size})
            small.append(decoded.thumbnail)
        progress.advance(len(batch), skipped=sum(bool(decoded.reason) for decoded in batch))
    table = pa.Table.from_pylist(items, schema=ITEM_SCHEMA)
    return Piece(np.concatenate(vectors), table, small if thumbnails else None, skipped)


class _Decoder(Dataset):
    """Decodes records; a DataLoader calls it in its worker processes."""

    def __init__(self, records: list[Record], clip: Clip, thumbnails: int):
        self.records = records
        self.transform = clip.transform
        self.thumbnails = thumbnails

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> _Decoded:
        record = self.records[index]
        try:
            picture = record.read()
            decoded = _Decoded(record, pixels=self.transform(picture), width=picture.width, height=picture.height)
            if self.thumbnails:
                decoded.thumbnail = thumbnail_bytes(picture, self.thumbnails)
            return decoded
        except Exception as error:  # damaged bytes make a decoder raise anything; the picture is listed as skipped
            return _Decoded(record, reason=one_line(str(error)) or type(error).__name__)


def _collate(batch: list[_Decoded]) -> tuple[list[_Decoded], torch.Tensor]:
    """Joins the pixels, (n, 3, H, W) of the good ones: a tensor each would cost a file descriptor each on its way
    from the worker."""
    pixels = [decoded.pixels for decoded in batch if not decoded.reason]
    for decoded in batch:
        decoded.pixels = None
    return batch, torch.stack(pixels) if pixels else torch.empty(0)
