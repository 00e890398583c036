"""A checkpoint folder: config, weights and tokenizer in Hugging Face's files, and a note on where its pictures are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from valm.config import ValmConfig
from valm.errors import ValmError
from valm.files import check_all_regular, read_json, writable_folder, write_json
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_index import index_parameters
from valm.retrieval.retriever import BlindRetriever, Retriever
from valm_kernels.atomic_files import atomic_folder, move, remove_leftovers, sync_folder, temporary_name
from valm_kernels.json_files import PathText, short

CONFIG_FILE = "config.json"
RETRIEVAL_FILE = "retrieval.json"
# A checkpoint that was written whole, until its files have taken the places of the old ones.
NEW_FOLDER = "checkpoint.new"
WEIGHTS = "model*.safetensors*"


class Config(TypedDict, total=False):
    """What is read of config.json here."""

    model_type: Any


class RetrievalNote(TypedDict):
    """What is read of retrieval.json."""

    knowledge_base: PathText
    query: Literal["eot", "state"]


def save_checkpoint(model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> Path:
    """Writes `folder`; `load_checkpoint` and `AutoModelForCausalLM.from_pretrained` read it.

    All files are written into NEW_FOLDER in it, which appears whole, and linked from there to where the old ones are.
    Killed before that folder appears, `load_checkpoint` loads the old checkpoint, killed later, the new one.

    Raises:
        ValmError: the folder cannot be written, or not all of it; the old checkpoint still loads.
    """
    folder = writable_folder(folder)
    remove_leftovers(folder)
    _switch(folder)  # where an earlier save was killed
    try:
        with atomic_folder(folder / NEW_FOLDER) as temporary, _quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except Exception as error:  # a full disk has a type of its own in safetensors, and in tokenizers
        reason = str(error).strip().partition("\n")[0]
        raise ValmError(f"cannot write the checkpoint {folder}: {reason}; what it held before is untouched") from error
    _switch(folder)
    return folder


def _switch(folder: Path) -> None:
    """Links the files of NEW_FOLDER, where there is one, to where the old ones are, and removes it."""
    new = folder / NEW_FOLDER
    if not new.is_dir():
        return
    try:
        names = {file.name for file in new.iterdir()}
        for name in names:
            _link(new / name, folder / name)
        for file in folder.glob(WEIGHTS):  # transformers prefers one file to several
            if file.name not in names:
                file.unlink()
        sync_folder(folder)
        finished = temporary_name(new)
        os.replace(new, finished)
    except OSError as error:
        raise ValmError(
            f"the checkpoint is whole in {new} and loads from there, but its files cannot be moved to {folder}: "
            f"{error.strerror}; save it again"
        ) from error
    shutil.rmtree(finished, ignore_errors=True)


def _link(file: Path, target: Path) -> None:
    """Has `target` name the content of `file`, in one step."""
    temporary = temporary_name(target)
    try:
        os.link(file, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(file, temporary)
    try:
        move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # moved to another name of itself, a file stays


def save_retrieval(folder: str | os.PathLike, kb: ImageKnowledgeBase, query: str) -> None:
    """Notes in the checkpoint `folder` where its pictures are, relative to it (the two can be moved together), the kind
    of query that finds them (see `ContextEncoder`) and the index that it finds them through."""
    index = index_parameters(kb)
    note = {
        "knowledge_base": os.path.relpath(kb.path, folder),
        "query": query,
        "index": "exact" if index is None else asdict(index),
    }
    write_json(Path(folder) / RETRIEVAL_FILE, note)


def load_checkpoint(
    folder: str | os.PathLike,
    *,
    kb: str | os.PathLike | None = None,
    clip: str | None = None,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[VaLMForCausalLM, PreTrainedTokenizerFast]:
    """The model, in eval mode and on `device`, and the tokenizer that `save_checkpoint` wrote.

    A model that sees pictures gets its retriever: with the knowledge base that `save_retrieval` noted, or `kb`; and
    with the CLIP which that was built with (`clip` and allow_download as in `ImageKnowledgeBase.load_clip`); its
    tokenizer need not be the model's (`ContextEncoder`). Without any knowledge base it has none, and needs `image_pool`
    in each call.

    Raises:
        ValmError: there is no whole VaLM checkpoint, or its config, weights, tokenizer, knowledge base and CLIP do
            not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValmError(f"there is no checkpoint folder {folder}")
    # where the writer was killed while the new files took their places, some of those in `folder` are old
    files = folder / NEW_FOLDER if (folder / NEW_FOLDER).is_dir() else folder
    if not (files / CONFIG_FILE).is_file():
        raise ValmError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    check_all_regular(files)
    kind = read_json(files / CONFIG_FILE, "the config", Config, "save the checkpoint again").get("model_type")
    if kind != ValmConfig.model_type:
        raise ValmError(f"{folder} holds a model of type {short(kind)}, expected {ValmConfig.model_type!r}")
    try:
        with _quiet_transformers():
            model, report = VaLMForCausalLM.from_pretrained(
                files, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
            )
        tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, each for one damaged file
        raise ValmError(f"the checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from error
    wrong = [f"{name} {sorted(map(str, found))[0]}" for name, found in report.items() if found]
    if wrong:
        raise ValmError(f"the weights in {folder} are not those of its {CONFIG_FILE}: {'; '.join(wrong)}")
    if len(tokenizer) != model.config.vocab_size:
        raise ValmError(
            f"the tokenizer in {folder} has {len(tokenizer)} pieces, "
            f"but the model's vocab_size is {model.config.vocab_size}"
        )
    if model.config.num_images == 0 and kb is not None:
        raise ValmError(f"the model in {folder} sees no pictures (GPT-2*), so it takes no knowledge base")
    if model.config.num_images > 0:
        _add_retriever(model, tokenizer, folder, kb, clip, allow_download, device)
    return model.eval().to(device), tokenizer


def _add_retriever(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    kb: str | os.PathLike | None,
    clip: str | None,
    allow_download: bool,
    device: str | torch.device,
) -> None:
    noted = folder / RETRIEVAL_FILE
    query = "eot"
    if noted.exists():
        retrieval: RetrievalNote = read_json(noted, "the note on retrieval", RetrievalNote, "delete it and give the kb")
        query = retrieval["query"]
        kb = folder / retrieval["knowledge_base"] if kb is None else kb
    if kb is None:
        return
    opened = ImageKnowledgeBase.open(kb)
    found = opened.load_clip(clip, allow_download=allow_download).to(device)
    encoder = ContextEncoder(found, tokenizer=tokenizer, query=query)
    try:
        blind = model.config.blind
        model.set_retriever(BlindRetriever(encoder) if blind else Retriever(encoder, opened, model.config.num_images))
    except ValueError as error:
        raise ValmError(f"the model in {folder} and the knowledge base {kb} do not fit: {error}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' bar for every file and its table of weights that do not fit."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
