"""Knowledge bases from a folder of pictures, webdataset tars, ready embeddings, and other knowledge bases."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.clip import Clip
from valm.errors import ValmError
from valm.files import cannot_read, check_regular, is_passing
from valm.knowledge_base.encode import Record, encode_records, folder_records
from valm.knowledge_base.format import ITEM_SCHEMA, WHAT, Piece, clip_entry, finish_knowledge_base, write_piece
from valm.knowledge_base.images import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, PICTURE_SUFFIXES, parse_caption
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.shards.build import Run, ShardedBuild, Work, run_here
from valm.shards.progress import Progress, ProgressBar
from valm.text import one_line

# Rows of embeddings that are normalised at once.
BLOCK_ROWS = 1 << 16
# Bytes after the last member of an archive that must be zero: tar itself pads with a few thousand.
END_BYTES = 1 << 20


def build_from_folder(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    clip: Clip,
    *,
    captions: str | os.PathLike | None = None,
    batch_size: int = 64,
    shard_size: int = 16384,
    thumbnails: int = 64,
    workers: int | None = None,
    progress: bool = True,
    run: Run = run_here,
) -> ImageKnowledgeBase:
    """Encodes every picture under `folder` and writes a knowledge base to `out`.

    captions: a table of captions; without it they are looked for as `read_captions` says.
    shard_size: pictures in a shard, which is also what a killed build has to do again. The result of a build that
        was killed and run again is the same to the byte. A build that was already finished is opened.
    thumbnails: longer side of the small pictures that are kept; 0 keeps none.
    workers: processes that decode pictures; None chooses by the number of pictures and cores, 0 decodes here.
    run: where the shards are encoded: here, or on the machines of a `valm.shards.ray.RayRun`.
    Pictures that are damaged are left out and listed (`skipped()`), and so are caption files.
    Raises ValmError for a folder that is missing or without (readable) pictures, and for an `out` that cannot be
    written or holds something else; also where a drive, or anything else but the picture, is why one cannot be read:
    run again, the build goes on.
    """
    records = folder_records(Path(folder), Path(captions) if captions is not None else None)
    fingerprint = hashlib.sha256()
    for record in records:
        file = record.source
        size = file.stat().st_size if file is not None and file.is_file() else None
        fingerprint.update(json.dumps([record.uri, record.caption, size]).encode())
    plan = {
        "source": "folder",
        "fingerprint": fingerprint.hexdigest(),
        "clip": clip.weights_hash,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "thumbnails": thumbnails,
    }
    pieces = [records[start : start + shard_size] for start in range(0, len(records), shard_size)]
    work = partial(encode_shard, clip=clip, batch_size=batch_size, thumbnails=thumbnails, workers=workers)
    return build_shards(out, plan, clip, work, lambda done: pieces, len(pieces), ("encode", " pictures"), progress, run)


def build_from_webdataset(
    tars: str | os.PathLike | list[str | os.PathLike],
    out: str | os.PathLike,
    clip: Clip,
    *,
    batch_size: int = 64,
    thumbnails: int = 64,
    workers: int | None = None,
    progress: bool = True,
    run: Run = run_here,
) -> ImageKnowledgeBase:
    """Encodes the pictures in tar files, as img2dataset and webdataset write them; one shard for each tar.

    tars: a folder of `*.tar` files, one file, or several. In each, members whose names agree up to the first dot belong
        together: a picture, and its caption in `.txt` or as `caption` in `.json`.
    The other arguments, and what a killed build does, as in `build_from_folder`. Nothing is unpacked, so names in
    an archive can be anything. An archive that is cut short or damaged is listed as skipped, and read up to there; so
    are caption files, as in a folder, and all but the last of several pictures that belong together.
    Raises ValmError where there is no tar or no readable picture, and for an `out` as `build_from_folder` does.
    """
    if not isinstance(tars, list):
        source = Path(tars)
        tars = [source] if source.is_file() else sorted(source.glob("*.tar"))
        if not tars:
            raise ValmError(f"no tar files in {source}; looked for files ending in .tar")
    tars = [Path(tar).absolute() for tar in tars]
    for tar in tars:
        check_regular(tar)
    plan = {
        "source": "webdataset",
        "fingerprint": _fingerprint(tars),
        "clip": clip.weights_hash,
        "batch_size": batch_size,
        "thumbnails": thumbnails,
    }
    work = partial(_encode_tar, clip=clip, batch_size=batch_size, thumbnails=thumbnails, workers=workers)
    return build_shards(out, plan, clip, work, lambda done: tars, len(tars), ("encode", " pictures"), progress, run)


def build_from_embeddings(
    folder: str | os.PathLike, out: str | os.PathLike, clip: Clip, *, progress: bool = True, run: Run = run_here
) -> ImageKnowledgeBase:
    """A knowledge base of embeddings that are there already, in clip-retrieval's layout; one shard for each file.

    folder: has `img_emb/*.npy` (N, E) and `metadata/*.parquet` with the same numbers in their names. Of the
        metadata, `url` or else `image_path` becomes the uri, `caption` and `width`, `height` (or
        `original_width`, `original_height`) are taken where they are there.
    clip: the CLIP that made the embeddings. That it did cannot be checked beyond the width of the vectors.
    Vectors are L2-normalised; one that is zero or not finite is skipped and listed.
    Raises ValmError where files are missing, do not fit together, have the same number or are damaged.
    """
    folder = Path(folder).absolute()
    vectors = _by_number((folder / "img_emb").glob("*.npy"))
    metadata = _by_number((folder / "metadata").glob("*.parquet"))
    if not vectors:
        raise ValmError(f"no embeddings in {folder}; expected img_emb/*.npy and metadata/*.parquet")
    for number, file in vectors.items():
        if number not in metadata:
            raise ValmError(f"{file} has no metadata: expected metadata/metadata_{file.stem.split('_')[-1]}.parquet")
    pairs = [(file, metadata[number]) for number, file in vectors.items()]
    fingerprint = _fingerprint([file for pair in pairs for file in pair])
    plan = {"source": "embeddings", "fingerprint": fingerprint, "clip": clip.weights_hash}
    work = partial(_copy_embeddings, dim=clip.embed_dim)
    return build_shards(out, plan, clip, work, lambda done: pairs, len(pairs), ("copy", " vectors"), progress, run)


def merge(parts: list[str | os.PathLike], out: str | os.PathLike, *, progress: bool = True) -> ImageKnowledgeBase:
    """Joins knowledge bases of one CLIP into a new one; pictures are counted on in the order of `parts`.

    Raises ValmError for no parts, parts of different CLIPs, and an `out` as `build_from_folder` does.
    """
    opened = [ImageKnowledgeBase.open(part) for part in parts]
    if not opened:
        raise ValmError("nothing to merge: name at least one knowledge base")
    first = opened[0].manifest["clip"]
    for kb in opened[1:]:
        other = kb.manifest["clip"]
        if other["weights_hash"] != first["weights_hash"]:
            raise ValmError(
                f"{opened[0].path} was built with the CLIP {first['name']} (weights {first['weights_hash'][:12]}) but "
                f"{kb.path} with {other['name']} ({other['weights_hash'][:12]}); merge only those of one CLIP"
            )
    plan = {"source": "merge", "parts": [kb.fingerprint for kb in opened]}
    source = first["source"]
    if source is not None and (opened[0].path / source).is_dir():
        source = Path(os.path.relpath(opened[0].path / source, out)).as_posix()
    build = ShardedBuild(out, WHAT, plan)
    if not build.finished:
        parts = [(kb, number) for kb in opened for number in range(len(kb.manifest["shards"]))]
        with ProgressBar("merge", " pictures", len(parts) - len(build.done()), progress) as bar:
            build.write(partial(_copy_shard, out=build.out), parts, run_here, bar)
        finish_knowledge_base(build, {**first, "source": source}, opened[0].dim)
    return ImageKnowledgeBase.open(out)


def build_shards(
    out: str | os.PathLike,
    plan: dict[str, Any],
    clip: Clip,
    work: Work,
    parts: Callable[[dict[int, dict[str, Any]]], Iterable[Any]],
    count: int | None,
    bar: tuple[str, str],
    progress: bool,
    run: Run,
) -> ImageKnowledgeBase:
    """Has `work` done for each part of the source, a shard each, where it is not done yet.

    parts: given the records of the shards that are done, all parts. count: how many, None where nobody knows.
    bar: name and unit of the progress bar.
    """
    build = ShardedBuild(out, WHAT, plan)
    if not build.finished:
        done = build.done()
        with ProgressBar(*bar, None if count is None else count - len(done), progress) as shown:
            build.write(partial(work, out=build.out.absolute()), parts(done), run, shown)
        finish_knowledge_base(build, clip_entry(clip, out), clip.embed_dim)
    return ImageKnowledgeBase.open(out)


def encode_shard(
    number: int,
    records: list[Record],
    progress: Progress,
    *,
    out: Path,
    clip: Clip,
    batch_size: int,
    thumbnails: int,
    workers: int | None,
    **facts: Any,
) -> None:
    """Encodes `records` and writes them as shard `number` of `out`, with `facts` in its record."""
    write_piece(out, number, encode_records(records, clip, batch_size, thumbnails, workers, progress), **facts)


def _encode_tar(
    number: int,
    tar: Path,
    progress: Progress,
    *,
    out: Path,
    clip: Clip,
    batch_size: int,
    thumbnails: int,
    workers: int | None,
) -> None:
    write_piece(out, number, encode_records(_read_tar(tar), clip, batch_size, thumbnails, workers, progress))


def _copy_embeddings(number: int, files: tuple[Path, Path], progress: Progress, *, out: Path, dim: int) -> None:
    piece = _embeddings_piece(*files, dim)
    progress.begin(len(piece.items) + len(piece.skipped))
    write_piece(out, number, piece)
    progress.advance(len(piece.items) + len(piece.skipped), len(piece.skipped))


def _copy_shard(number: int, shard: tuple[ImageKnowledgeBase, int], progress: Progress, *, out: Path) -> None:
    kb, shard_number = shard
    piece = kb.piece(shard_number)
    progress.begin(len(piece.items))
    write_piece(out, number, piece)
    progress.advance(len(piece.items))


def _read_tar(path: Path) -> list[Record]:
    """The pictures of a tar file, with their captions; at the end what is wrong with it, without a picture.

    Raises ValmError where the drive, or whatever else is not the archive itself, is why it cannot be read.
    """
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[tuple[str, str], str] = {}
    wrong: list[Record] = []

    def skip(name: str, reason: str) -> None:
        wrong.append(Record(name, "", None, reason=reason))

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # the next one would be this one again
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                name = PurePosixPath(member.name)
                stem, _, extension = name.name.partition(".")
                key, suffix = str(name.parent / stem), f".{extension.lower()}"
                uri = f"{path.name}/{member.name}"
                if not member.isfile() or suffix not in (*PICTURE_SUFFIXES, *CAPTION_SUFFIXES):
                    continue
                if member.issparse():
                    skip(uri, "stored as a sparse file, which a few bytes make as large as they like")
                elif suffix in PICTURE_SUFFIXES:
                    if key in pictures:
                        skip(f"{path.name}/{pictures[key].name}", f"{member.name} comes after it in its place")
                    pictures[key] = member
                else:
                    content = tar.extractfile(member).read(MAX_CAPTION_BYTES + 1)
                    try:
                        captions[key, suffix] = parse_caption(content, suffix)
                    except ValueError as error:
                        skip(uri, str(error))
            # tarfile takes a damaged or empty header for the end, and no end at all
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(END_BYTES)
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise tarfile.ReadError(f"at byte {tar.offset:,} there is neither a member nor the end of the archive")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if is_passing(error):
            raise cannot_read(path, one_line(str(error))) from error
        skip(path.name, f"the archive ends early: {one_line(str(error))}")
    records = []
    for key, member in pictures.items():
        caption = next(filter(None, (captions.get((key, suffix)) for suffix in CAPTION_SUFFIXES)), "")
        records.append(Record(f"{path.name}/{member.name}", caption, path, member.offset_data, member.size))
    return records + wrong


def _embeddings_piece(vector_file: Path, metadata_file: Path, dim: int) -> Piece:
    for file in (vector_file, metadata_file):
        check_regular(file)
    try:
        raw = np.load(vector_file, mmap_mode="r", allow_pickle=False)
        metadata = pq.read_table(metadata_file)
        items = _items(metadata, vector_file)
    except Exception as error:  # a damaged header makes numpy raise anything, and so do odd columns Arrow
        raise ValmError(f"cannot read {vector_file} and {metadata_file}: {one_line(str(error))}") from error
    if raw.ndim != 2 or raw.shape[1] != dim or raw.dtype.kind != "f":
        raise ValmError(f"{vector_file} holds {raw.dtype} {raw.shape}, expected floats (N, {dim}) for this CLIP")
    if len(metadata) != len(raw):
        raise ValmError(f"{vector_file} has {len(raw)} vectors, but {metadata_file} {len(metadata)} rows")
    vectors = np.empty(raw.shape, np.float16)
    good = np.empty(len(raw), bool)
    for start in range(0, len(raw), BLOCK_ROWS):
        block = raw[start : start + BLOCK_ROWS].astype(np.float32)
        norms = np.linalg.norm(block, axis=1)
        usable = np.isfinite(norms) & (norms > 0)
        good[start : start + len(block)] = usable
        vectors[start : start + len(block)] = block / np.where(usable, norms, 1)[:, None]
    bad = items.filter(pa.array(~good))["uri"].to_pylist()
    skipped = [{"uri": uri, "reason": "its embedding is zero or not finite"} for uri in bad]
    return Piece(vectors[good], items.filter(pa.array(good)), None, skipped)


def _items(metadata: pa.Table, vector_file: Path) -> pa.Table:
    """The metadata's columns under our names; what is missing is empty or 0."""

    def column(names: list[str], default: Any, type: pa.DataType) -> pa.Array:
        name = next((name for name in names if name in metadata.column_names), None)
        if name is None:
            return pa.array([default] * len(metadata), type)
        return metadata[name].cast(type).fill_null(default)

    rows = [f"{vector_file.name}/{row}" for row in range(len(metadata))]
    uri = pa.array(rows) if not {"url", "image_path"} & set(metadata.column_names) else None
    return pa.table(
        {
            "uri": column(["url", "image_path"], "", pa.string()) if uri is None else uri,
            "caption": column(["caption"], "", pa.string()),
            "width": column(["width", "original_width"], 0, pa.int32()),
            "height": column(["height", "original_height"], 0, pa.int32()),
        },
        schema=ITEM_SCHEMA,
    )


def _fingerprint(files: list[Path]) -> str:
    """SHA-256 over names and sizes. Raises ValmError for a file that is missing."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(json.dumps([file.name, file.stat().st_size]).encode())
        except OSError as error:
            raise ValmError(f"cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()


def _by_number(files: Iterable[Path]) -> dict[int, Path]:
    """The files by the number that ends their names, 0 for none: img_emb_12.npy comes after img_emb_2.npy.

    Raises ValmError for two of one number: what belongs to which is not to be guessed.
    """
    found: dict[int, Path] = {}
    for file in sorted(files):
        match = re.search(r"(\d+)$", file.stem)
        number = int(match[1]) if match else 0
        if number in found:
            raise ValmError(f"{found[number]} and {file.name} both have the number {number}; give each one of its own")
        found[number] = file
    return dict(sorted(found.items()))
