"""A checkpoint folder: config, weights and tokenizer in Hugging Face's files, and a note on where its pictures are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from valm.config import ValmConfig
from valm.errors import ValmError
from valm.files import read_json, writable_folder, write_json
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model import VaLMForCausalLM
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_index import index_parameters
from valm.retrieval.retriever import BlindRetriever, Retriever

CONFIG_FILE = "config.json"
RETRIEVAL_FILE = "retrieval.json"


def save_checkpoint(model: VaLMForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> Path:
    """Writes `folder`; `load_checkpoint` and `AutoModelForCausalLM.from_pretrained` read it.

    All files are written into a folder of their own first and then moved, the config last: a folder that the
    writer was killed in has none and so is no checkpoint.

    Raises:
        ValmError: the folder cannot be written.
    """
    folder = writable_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary, _quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == CONFIG_FILE):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
            os.replace(file, folder / file.name)
    return folder


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
    device: str | torch.device = "cpu",
) -> tuple[VaLMForCausalLM, PreTrainedTokenizerFast]:
    """The model, in eval mode and on `device`, and the tokenizer that `save_checkpoint` wrote.

    A model that sees pictures gets its retriever: with the knowledge base that `save_retrieval` noted, or `kb`; and
    with the CLIP which that was built with, found where it was then, or at `clip` (see `Clip.load`); its tokenizer need
    not be the model's (`ContextEncoder`). Without any knowledge base it has none, and needs `image_pool` in each call.

    Raises:
        ValmError: there is no whole VaLM checkpoint, or its config, weights, tokenizer, knowledge base and CLIP do
            not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValmError(f"there is no checkpoint folder {folder}")
    if not (folder / CONFIG_FILE).is_file():
        raise ValmError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    kind = read_json(folder / CONFIG_FILE, "the config").get("model_type")
    if kind != ValmConfig.model_type:
        raise ValmError(f"{folder} holds a model of type {kind!r}, expected {ValmConfig.model_type!r}")
    try:
        with _quiet_transformers():
            loaded: Any = VaLMForCausalLM.from_pretrained(  # a pair, which its annotation does not say
                folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds, each for one damaged file
        raise ValmError(f"the checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValmError(f"the tokenizer in {folder} is a {type(tokenizer).__name__}, not one with a tokenizer.json")
    model: VaLMForCausalLM = loaded[0]
    report: dict[str, Any] = loaded[1]
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
        _add_retriever(model, tokenizer, folder, kb, clip, device)
    return model.eval().to(device), tokenizer


def _add_retriever(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    kb: str | os.PathLike | None,
    clip: str | None,
    device: str | torch.device,
) -> None:
    noted = folder / RETRIEVAL_FILE
    query = "eot"
    if noted.exists():
        retrieval = read_json(noted, "the note on retrieval")
        query = retrieval["query"]
        kb = folder / retrieval["knowledge_base"] if kb is None else kb
    if kb is None:
        return
    opened = ImageKnowledgeBase.open(kb)
    encoder = ContextEncoder(opened.load_clip(clip).to(device), tokenizer=tokenizer, query=query)
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
