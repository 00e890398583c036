"""valm kb build, info, verify, merge, search."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, command, positive
from valm.errors import ValmError


def add_to(commands: Commands) -> None:
    kb = commands.add_parser("kb", help="build, inspect and search an image knowledge base")
    kb_commands = kb.add_subparsers(required=True, metavar="COMMAND")
    build = command(kb_commands, "build", run_build, "encode a folder of pictures into a knowledge base")
    build.add_argument("folder", type=Path, help="where the pictures are")
    build.add_argument(
        "--format",
        choices=["pictures", "webdataset", "embeddings"],
        default="pictures",
        help="pictures with captions beside them or in a captions table; tar files as img2dataset writes them; "
        "embeddings that --clip has made, in clip-retrieval's layout",
    )
    build.add_argument("--clip", required=True, help="CLIP folder, hf-hub:ORGANISATION/MODEL or ARCHITECTURE:WEIGHTS")
    build.add_argument("--out", type=Path, required=True, help="folder of the knowledge base; a killed build goes on")
    build.add_argument("--captions", type=Path, help="table of captions, where it is not beside the pictures")
    build.add_argument("--batch-size", type=positive, default=64)
    build.add_argument("--thumbnails", type=int, default=64, help="longer side of the pictures kept; 0 keeps none")
    info = command(kb_commands, "info", run_info, "what a knowledge base holds")
    info.add_argument("kb", type=Path)
    verify = command(kb_commands, "verify", run_verify, "read a whole knowledge base and compare its checksums")
    verify.add_argument("kb", type=Path)
    merge = command(kb_commands, "merge", run_merge, "join knowledge bases of one CLIP")
    merge.add_argument("parts", type=Path, nargs="+", metavar="KB")
    merge.add_argument("--out", type=Path, required=True, help="folder of the joined knowledge base")
    search = command(kb_commands, "search", run_search, "the pictures nearest to a text")
    search.add_argument("kb", type=Path)
    search.add_argument("text")
    search.add_argument("--clip", help="the CLIP, where it is no longer where the knowledge base found it")
    search.add_argument("-k", type=positive, default=8, help="how many pictures")
    search.add_argument("--sheet", type=Path, help="also draw what was found into this picture file")


def run_build(arguments: argparse.Namespace) -> None:
    from valm.retrieval.builders import build_from_embeddings, build_from_folder, build_from_webdataset
    from valm.retrieval.clip import Clip

    if arguments.captions is not None and arguments.format != "pictures":
        raise ValmError(f"--captions is for --format pictures; {arguments.format} bring their own")
    source = (arguments.folder, arguments.out, Clip.load(arguments.clip))
    encoding = {"batch_size": arguments.batch_size, "thumbnails": arguments.thumbnails}
    if arguments.format == "embeddings":
        kb = build_from_embeddings(*source)
    elif arguments.format == "webdataset":
        kb = build_from_webdataset(*source, **encoding)
    else:
        kb = build_from_folder(*source, **encoding, captions=arguments.captions)
    print_kb(kb)


def run_info(arguments: argparse.Namespace) -> None:
    from valm.retrieval.knowledge_base import ImageKnowledgeBase

    print_kb(ImageKnowledgeBase.open(arguments.kb))


def run_verify(arguments: argparse.Namespace) -> None:
    from valm.retrieval.knowledge_base import ImageKnowledgeBase

    kb = ImageKnowledgeBase.open(arguments.kb)
    damaged = kb.verify()
    if damaged:
        raise ValmError(f"{arguments.kb} is damaged, build it again: {', '.join(damaged)}")
    print(f"{arguments.kb}: all {len(kb):,} pictures are as they were written")


def run_merge(arguments: argparse.Namespace) -> None:
    from valm.retrieval.builders import merge

    print_kb(merge(arguments.parts, arguments.out))


def print_kb(kb) -> None:
    clip = kb.manifest["clip"]
    print(f"{kb.path}: {len(kb):,} pictures, {kb.dim} dimensions, {kb.manifest['dtype']}")
    print(f"encoded by the CLIP {clip['name']}, weights {clip['weights_hash'][:12]}")
    skipped = kb.skipped()
    if skipped:
        print(f"{len(skipped)} pictures could not be read:")
        for picture in skipped:
            print(f"  {picture['uri']}: {picture['reason']}")


def run_search(arguments: argparse.Namespace) -> None:
    from valm.retrieval.contact_sheet import contact_sheet
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.knowledge_base import ImageKnowledgeBase
    from valm.retrieval.retriever import Retriever

    kb = ImageKnowledgeBase.open(arguments.kb)
    retriever = Retriever(ContextEncoder(kb.load_clip(arguments.clip)), kb, k=1)
    results = retriever.search(arguments.text, arguments.k)
    for score, item in results:
        caption = item.caption.splitlines()[0] if item.caption else ""
        print(f"{score:7.4f}  {item.uri}  {caption}")
    if arguments.sheet is not None:
        try:
            contact_sheet(kb, results, arguments.text).save(arguments.sheet)
        except ValueError as error:  # a file name whose ending Pillow does not know
            raise ValmError(f"cannot write the picture {arguments.sheet}: {error}") from error
