"""Small images, archives and folders of them, for the tests of several modules."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from valm.knowledge_base.build import build
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.folder import FolderSource

# Readable images in the fixture `folder`.
COUNT = 23


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def build_folder(folder, out, clip, shard_size=6, batch_size=4, thumbnails=64, workers=None):
    source = FolderSource(folder, shard_size=shard_size)
    return build(source, out, clip, Encoding(batch_size, thumbnails, workers), progress=False)


def write_embeddings(folder, number, vectors, **columns):
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
