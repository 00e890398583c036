"""valm verify."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, command
from valm.errors import ValmError

EXAMPLE = "valm verify kb"


def add_to(commands: Commands) -> None:
    help = "check every file of a folder that valm wrote against its checksums"
    verify = command(commands, "verify", run_verify, help, EXAMPLE)
    what = "folder of a knowledge base, a retrieved corpus or a FlatIPIndex, or of `valm pictures`"
    verify.add_argument("folder", type=Path, help=what)


def run_verify(arguments: argparse.Namespace) -> None:
    print(verify(arguments.folder))


def verify(folder: Path) -> str:
    """Reads all of a store, and returns a sentence about it.

    Raises:
        ValmError: the store is damaged, or the folder has no checksums.
    """
    from valm.corpus.retrieved import WHAT as CORPUS
    from valm.knowledge_base.format import WHAT as KNOWLEDGE_BASE
    from valm.store.parts import KB, RETRIEVAL, part_of, read_parts
    from valm.store.shards import BUILD_FILE, MANIFEST_FILE, read_manifest

    if not folder.is_dir():
        raise ValmError(f"there is no folder {folder}")
    if read_parts(folder) is not None:
        return "\n".join(verify(part_of(folder, part)) for part in (KB, RETRIEVAL))
    if (folder / MANIFEST_FILE).exists():
        of = read_manifest(folder).get("format")
        if of == f"valm {KNOWLEDGE_BASE}":
            return _knowledge_base(folder)
        if of == f"valm {CORPUS}":
            return _corpus(folder)
        return _index(folder)
    if (folder / BUILD_FILE).exists():
        raise ValmError(f"{folder} is unfinished: run its command again, which resumes it")
    raise ValmError(
        f"{folder} has no checksums: give a knowledge base, a retrieved corpus or a FlatIPIndex. A checkpoint, a model "
        "or a CLIP is checked when it is loaded"
    )


def _knowledge_base(folder: Path) -> str:
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.retrieval.faiss_index import verify_index
    from valm.retrieval.index_parameters import INDEX_FILE, index_parameters

    kb = ImageKnowledgeBase.open(folder)
    if damaged := kb.verify() + verify_index(kb):
        raise ValmError(f"{folder} is damaged, build it again: {', '.join(damaged)}")
    found = f"{folder}: all {len(kb):,} images are as they were written"
    if index_parameters(kb) is None and (folder / INDEX_FILE).exists():
        found += f"; {INDEX_FILE} has no parameters, as after a killed `valm kb index`, and is not used: index again"
    return found


def _corpus(folder: Path) -> str:
    from valm.corpus.retrieved import CorpusRetrieval

    found = CorpusRetrieval.open(folder)
    if damaged := found.verify():
        raise ValmError(f"{folder} is damaged, retrieve it again: {', '.join(damaged)}")
    _ = found.tokenizer  # compared with its hash in the manifest
    return f"{folder}: all {len(found):,} documents are as they were written"


def _index(folder: Path) -> str:
    from valm_kernels import FlatIPIndex

    try:
        rows = len(FlatIPIndex.load(folder, mmap=True, verify=True))
    except (ValueError, OSError) as error:
        raise ValmError(f"{error}; make the index again") from error
    return f"{folder}: all {rows:,} rows are as they were written"
