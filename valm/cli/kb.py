"""valm kb build, add, info, index, merge, dedupe, search."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.cli.options import (
    Commands,
    add_clip,
    add_device,
    add_json,
    chosen_device,
    command,
    positive,
    print_json,
)
from valm.clip.execution import Execution
from valm.errors import ValmError
from valm.knowledge_base.images import ImageSource
from valm.knowledge_base.records import Encoding
from valm.options import add_fields, given_fields
from valm.retrieval.index_parameters import IndexPlan
from valm.text import printable
from valm.training.launch import check_alone

if TYPE_CHECKING:
    from PIL import Image

    from valm.knowledge_base.sources import Source
    from valm.knowledge_base.store import ImageKnowledgeBase

SKIPPED_SHOWN = 10
FOUND_SHOWN = 8  # images that a search lists
CAPTION_SHOWN = 100  # characters
MAX_COMPARED = 1_000_000  # most images among which `kb build` looks for duplicates; `kb dedupe` has no limit
MAX_COMPARED_AGAIN = 50_000  # the same for `kb add`, whose cost should depend on the new images only
RESUMES = "; the same command resumes a killed run"

BUILD = "valm kb build pictures --clip clip --out kb"
ADD = "valm kb add kb more-pictures --out larger-kb"
INFO = "valm kb info kb"
INDEX = "valm kb index kb --target-recall 0.95"
MERGE = "valm kb merge kb other-kb --out merged-kb"
DEDUPE = "valm kb dedupe merged-kb --out unique-kb"
SEARCH = 'valm kb search kb "a red apple" --sheet found.png'


def add_to(commands: Commands) -> None:
    kb = commands.add_parser("kb", help="build, inspect and search knowledge bases of images")
    kb_commands = kb.add_subparsers(required=True, metavar="COMMAND")
    build = command(kb_commands, "build", run_build, "encode images into a knowledge base", BUILD)
    add_images(build)
    add_fields(build, Encoding)
    build.add_argument(
        "--clip", required=True, help="CLIP that encodes: a folder, hf-hub:ORGANISATION/MODEL or ARCHITECTURE:WEIGHTS"
    )
    add_out(build, "knowledge base", RESUMES)
    add_fields(build, Execution)
    more = command(kb_commands, "add", run_add, "write a copy of a knowledge base with more images", ADD)
    add_kb(more)
    add_images(more, without="streaming")
    add_clip(more)
    add_out(more, "larger knowledge base", RESUMES)
    add_fields(more, Execution)
    info = command(kb_commands, "info", run_info, "print what a knowledge base contains", INFO)
    add_kb(info)
    add_json(info)
    index = command(kb_commands, "index", run_index, "index a large knowledge base for approximate search", INDEX)
    add_kb(index)
    add_fields(index, IndexPlan)
    add_clip(index)
    add_device(index, "queries are encoded, and faiss searches if it supports GPUs (cuda: all GPUs)")
    merge = command(kb_commands, "merge", run_merge, "join knowledge bases of one CLIP", MERGE)
    merge.add_argument("parts", type=Path, nargs="+", metavar="KB", help="folders of the knowledge bases")
    add_out(merge, "joined knowledge base")
    dedupe = command(kb_commands, "dedupe", run_dedupe, "copy a knowledge base without duplicate images", DEDUPE)
    add_kb(dedupe)
    add_out(dedupe, "copy", RESUMES)
    search = command(kb_commands, "search", run_search, "list the images nearest to a text or an image", SEARCH)
    add_kb(search)
    search.add_argument("text", nargs="?", help="text to search for")
    search.add_argument("--image", type=Path, help="image to search for, instead of a text")
    add_clip(search)
    add_device(search)
    search.add_argument("-k", type=positive, help=f"number of images to list (default: {FOUND_SHOWN})")
    search.add_argument("--sheet", type=Path, help="picture file, such as found.png, to draw the images into")
    add_json(search)


def add_kb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kb", type=Path, help="folder of the knowledge base")


def add_out(parser: argparse.ArgumentParser, what: str, more: str = "") -> None:
    parser.add_argument("--out", type=Path, required=True, help=f"folder to write the {what} to{more}")


def add_images(parser: argparse.ArgumentParser, without: str | None = None) -> None:
    """Declares the options that `open_images` reads, except the field `without` of `ImageSource`."""
    parser.add_argument(
        "source",
        type=Path,
        help="folder or zip file of images; with --format: a tar file or a folder of tar files, a table, or the name "
        "of a Hugging Face dataset",
    )
    add_fields(parser, ImageSource, without)


def open_images(arguments: argparse.Namespace) -> Source:
    """The source of the options of `add_images`; prints which files it ignores."""
    source = ImageSource(**given_fields(ImageSource, arguments)).open()
    for remark in getattr(source, "remarks", ()):
        print(printable(remark), file=sys.stderr)
    return source


def run_build(arguments: argparse.Namespace) -> None:
    check_alone("valm kb build")
    source = open_images(arguments)
    encoding = Encoding(**given_fields(Encoding, arguments))

    from valm.clip.clip import Clip

    execution = Execution(**given_fields(Execution, arguments))
    run = execution.runner()
    clip = Clip.load(arguments.clip, device=execution.opened_device())
    kb = built(arguments.out, source=source, clip=clip, encoding=encoding, run=run)
    if kb is not None:
        print_kb(kb)
        if len(kb) <= MAX_COMPARED:
            print_duplicates(kb)


def run_add(arguments: argparse.Namespace) -> None:
    from valm.knowledge_base.store import ImageKnowledgeBase

    check_alone("valm kb add")
    kb = ImageKnowledgeBase.open(arguments.kb)
    source = open_images(arguments)
    execution = Execution(**given_fields(Execution, arguments))
    run = execution.runner()
    clip = kb.load_clip(arguments.clip, allow_download=arguments.allow_download).to(execution.opened_device())
    joined = built(arguments.out, source=source, clip=clip, encoding=Encoding(**kb.encoding), after=kb, run=run)
    if joined is not None:
        print(f"{joined.path}: {len(joined):,} images, {len(joined) - len(kb):,} of them new")
        print_skipped(joined, kb.manifest["skipped"])
        if len(joined) <= MAX_COMPARED_AGAIN:
            print_duplicates(joined)


def built(out: Path, **options: Any) -> ImageKnowledgeBase | None:
    """The knowledge base that `build` makes in `out`; None, and a message, if `out` was complete before."""
    from valm.knowledge_base.build import build
    from valm.store.shards import MANIFEST_FILE

    finished = (out / MANIFEST_FILE).exists()
    kb = build(out=out, **options)
    if not finished:
        return kb
    print(f"{kb.path} is complete: {len(kb):,} images; nothing to do")
    return None


def run_info(arguments: argparse.Namespace) -> None:
    from valm.knowledge_base.store import ImageKnowledgeBase

    kb = ImageKnowledgeBase.open(arguments.kb)
    if arguments.json:
        print_json(kb_facts(kb))
    else:
        print_kb(kb)


def run_index(arguments: argparse.Namespace) -> None:
    from valm.knowledge_base.store import ImageKnowledgeBase

    plan = IndexPlan(**given_fields(IndexPlan, arguments))
    kb = ImageKnowledgeBase.open(arguments.kb)

    from valm.retrieval.index_parameters import EXACT_BELOW
    from valm.retrieval.index_tuning import index_knowledge_base

    device = chosen_device(arguments)
    of_clip = {"clip": arguments.clip, "allow_download": arguments.allow_download}
    if index_knowledge_base(kb, plan, **of_clip, device=device) is None:
        print(
            f"no index was built: an index of {len(kb):,} images would save no time (from {EXACT_BELOW:,} on it does; "
            "--factory builds an index of any size)"
        )
    print_kb(kb)


def run_merge(arguments: argparse.Namespace) -> None:
    from valm.knowledge_base.copy import merge

    print_kb(merge(arguments.parts, arguments.out))


def run_dedupe(arguments: argparse.Namespace) -> None:
    from valm.knowledge_base.copy import dedupe
    from valm.knowledge_base.store import ImageKnowledgeBase

    print_kb(dedupe(ImageKnowledgeBase.open(arguments.kb), arguments.out))


def print_duplicates(kb: ImageKnowledgeBase) -> None:
    """Warns about duplicate images."""
    from valm.knowledge_base.copy import duplicates

    twice = len(duplicates(kb))
    if twice:
        print(
            f"{twice:,} images have the same CLIP vector as an earlier image and would crowd out others: "
            f"`valm kb dedupe {kb.path} --out FOLDER` copies the knowledge base without them",
            file=sys.stderr,
        )


def kb_facts(kb: ImageKnowledgeBase) -> dict[str, Any]:
    """The output of `kb info`, as JSON."""
    from valm.retrieval.index_parameters import index_parameters
    from valm.store.shards import MANIFEST_FILE

    index = index_parameters(kb)
    return {
        "path": str(kb.path),
        "images": len(kb),
        "captions": kb.captioned(),
        "thumbnails": bool(kb.encoding.get("thumbnails")),
        "skipped": kb.manifest["skipped"],
        "dimensions": kb.dim,
        "dtype": kb.manifest["dtype"],
        "bytes": sum(shard["bytes"] for shard in kb.manifest["shards"]) + (0 if index is None else index.file["bytes"]),
        "source": kb.manifest["plan"].get("source"),
        "after": kb.manifest["plan"].get("after"),
        "written": datetime.fromtimestamp((kb.path / MANIFEST_FILE).stat().st_mtime).isoformat(" ", "minutes"),
        "clip": kb.manifest["clip"],
        "index": None if index is None else index.summary(),
    }


def print_kb(kb: ImageKnowledgeBase) -> None:
    facts = kb_facts(kb)
    clip = facts["clip"]
    thumbnails = "thumbnails" if facts["thumbnails"] else "no thumbnails"
    print(f"{kb.path}: {len(kb):,} images, {facts['captions']:,} with captions, {thumbnails}")
    print(f"{kb.dim} dimensions, {facts['dtype']}, {facts['bytes'] / 1e6:,.1f} MB")
    after = f", added to the knowledge base {printable(str(facts['after'])[:12])}" if facts["after"] else ""
    print(f"made of: {printable(str(facts['source']))}{after}, written {facts['written']}")
    print(f"encoded by the CLIP {printable(clip['name'])}, weights {printable(clip['weights_hash'][:12])}")
    index = facts["index"]
    print("searched exactly" if index is None else f"searched through the index {printable(index)}")
    print_skipped(kb)


def print_skipped(kb: ImageKnowledgeBase, before: int = 0) -> None:
    """Prints the first skipped images of `kb` after the first `before`."""
    skipped = kb.manifest["skipped"] - before
    if skipped:
        print(f"{skipped:,} images or captions could not be read:")
        for image in islice(kb.skipped(), before, before + SKIPPED_SHOWN):
            print(f"  {printable(image['uri'])}: {printable(image['reason'])}")
        if skipped > SKIPPED_SHOWN:
            print(f"  and {skipped - SKIPPED_SHOWN:,} more: `ImageKnowledgeBase.skipped()` lists all")


def run_search(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from valm.knowledge_base.contact_sheet import contact_sheet
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.store.files import output_file

    if (arguments.text is None) == (arguments.image is None):
        raise ValmError("give either a text or --image")
    if arguments.sheet is not None:
        picture_format = Image.registered_extensions().get(arguments.sheet.suffix.lower())
        if picture_format not in Image.SAVE:
            raise ValmError(
                f"cannot write the picture {arguments.sheet}: unknown file extension, expected .png or .jpg"
            )
    kb = ImageKnowledgeBase.open(arguments.kb)
    query = arguments.text if arguments.image is None else open_image(arguments.image)

    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.retriever import Retriever

    clip = kb.load_clip(arguments.clip, allow_download=arguments.allow_download).to(chosen_device(arguments))
    retriever = Retriever(ContextEncoder(clip), kb, k=1)
    results = retriever.search(query, FOUND_SHOWN if arguments.k is None else arguments.k)
    if arguments.k is not None and arguments.k > len(kb):
        print(f"{kb.path} contains {len(kb):,} images, fewer than -k {arguments.k:,}", file=sys.stderr)
    if arguments.json:
        print_json([{"score": score, **asdict(item)} for score, item in results])
    else:
        for score, item in results:
            caption = item.caption.splitlines()[0] if item.caption else ""
            print(f"{score:7.4f}  {printable(item.uri)}  {printable(shortened(caption))}")
    if arguments.sheet is not None:
        sheet = contact_sheet(kb, results, arguments.text or str(arguments.image))
        with output_file(arguments.sheet) as temporary:
            sheet.save(temporary, picture_format)


def open_image(path: Path) -> Image.Image:
    """The image in a file.

    Raises:
        OSError: the file cannot be read.
        ValmError: the file is not an image.
    """
    from valm.clip.read_image import read_image
    from valm.store.files import is_transient

    try:
        return read_image(path)
    except Exception as error:  # decoders raise many types for damaged bytes
        if is_transient(error):
            raise
        raise ValmError(f"cannot read the image {path}: {error}") from error


def shortened(caption: str) -> str:
    """The caption, cut to CAPTION_SHOWN characters."""
    return caption if len(caption) <= CAPTION_SHOWN else f"{caption[: CAPTION_SHOWN - 1]}…"
