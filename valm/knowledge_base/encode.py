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

from valm.clip import Clip
from valm.files import cannot_read, is_passing
from valm.knowledge_base.format import ITEM_SCHEMA, Piece
from valm.knowledge_base.images import find_pictures, read_captions, read_picture, thumbnail_bytes
from valm.processes import end_with_parent
from valm.shards.progress import Progress
from valm.text import one_line, utf8

# Below this many pictures they are decoded in this process: starting others takes longer.
WORKERS_FROM_PICTURES = 512
MAX_WORKERS = 8


@dataclass(frozen=True)
class Record:
    """One picture of a source.

    source: a file, of which the picture is the whole or `size` bytes from `offset` (a member of a tar file); the
        content of a file; a PIL picture; or None, where there is no picture, but something to be listed as skipped.
    reason: why, where there is none.
    """

    uri: str
    caption: str
    source: Path | bytes | Image.Image | None
    offset: int = 0
    size: int | None = None
    reason: str = "there is no picture"

    def __post_init__(self):
        for name in ("uri", "caption"):  # whatever the source, they will be written as UTF-8
            object.__setattr__(self, name, utf8(getattr(self, name)))

    def read(self) -> Image.Image:
        """The picture as `read_picture` gives it. Raises anything where it cannot be read."""
        if isinstance(self.source, Path):
            if not self.source.is_file():  # opened, a pipe would be waited for
                raise ValueError("it is no file, or a link to none")
            with open(self.source, "rb") as file:
                file.seek(self.offset)
                return read_picture(io.BytesIO(file.read(self.size)))
        if self.source is None:
            raise ValueError(self.reason)
        return read_picture(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)


def folder_records(folder: Path, captions: Path | None = None) -> list[Record]:
    """Every picture under `folder`, with its caption (see `read_captions`); at the end the caption files that are
    damaged, without a picture. Raises ValmError as `find_pictures` and `read_captions` do."""
    pictures = find_pictures(folder)
    caption_of, damaged = read_captions(folder, pictures, captions)
    where = folder.absolute()  # another machine has another working directory
    records = [Record(picture, caption_of.get(picture, ""), where / picture) for picture in pictures]
    return records + [Record(file, "", None, reason=reason) for file, reason in damaged.items()]


@dataclass
class _Decoded:
    """What a worker made of the record `index`: sent back itself, it would take the bytes of its picture along.

    reason: why the picture could not be read; passing: and it may be read the next time (`is_passing`).
    """

    index: int
    reason: str = ""
    passing: bool = False
    pixels: torch.Tensor | None = None  # (3, H, W), until it is joined with the rest of the batch
    width: int = 0
    height: int = 0
    thumbnail: bytes | None = None


def encode_records(
    records: list[Record], clip: Clip, batch_size: int, thumbnails: int, workers: int | None, progress: Progress
) -> Piece:
    """Decodes and encodes the pictures of `records`; arguments as in `build_from_folder`.

    Raises ValmError where the drive, or whatever else is not the picture itself, is why one cannot be read.
    """
    if workers is None:
        # torch's threads and not the machine's cores: of those a Ray task has only some
        workers = min(torch.get_num_threads(), MAX_WORKERS) if len(records) >= WORKERS_FROM_PICTURES else 0
    progress.begin(len(records))
    vectors, items, small, skipped = [np.empty((0, clip.embed_dim), np.float32)], [], [], []
    decoder = _Decoder(records, clip, thumbnails)
    loader = DataLoader(decoder, batch_size, collate_fn=_collate, num_workers=workers, worker_init_fn=end_with_parent)
    for batch, pixels in loader:
        if len(pixels):
            vectors.append(clip.encode_images(pixels).cpu().numpy())
        for decoded in batch:
            record = records[decoded.index]
            if decoded.passing:
                raise cannot_read(record.uri, decoded.reason)
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
            decoded = _Decoded(index, pixels=self.transform(picture), width=picture.width, height=picture.height)
            if self.thumbnails:
                decoded.thumbnail = thumbnail_bytes(picture, self.thumbnails)
            return decoded
        except Exception as error:  # damaged bytes make a decoder raise anything; the picture is listed as skipped
            return _Decoded(index, one_line(str(error)) or type(error).__name__, is_passing(error))


def _collate(batch: list[_Decoded]) -> tuple[list[_Decoded], torch.Tensor]:
    """Joins the pixels, (n, 3, H, W) of the good ones: a tensor each would cost a file descriptor each on its way
    from the worker."""
    pixels = [decoded.pixels for decoded in batch if not decoded.reason]
    for decoded in batch:
        decoded.pixels = None
    return batch, torch.stack(pixels) if pixels else torch.empty(0)
