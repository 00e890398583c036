"""Opens models and tokenizers of transformers: without code of others, from their own folder, errors in a sentence."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging as transformers_logging
from typing_extensions import TypedDict

from valm.errors import ValmError, is_out_of_memory, is_panic
from valm.store.files import PathText, is_file, is_folder, read_json
from valm.text import one_line
from valm_kernels.json_files import short

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# A name on the Hugging Face Hub is cached if one of these files is.
CACHED = (CONFIG_FILE, "tokenizer_config.json", "tokenizer.json")
REMEDY = "save the model again"


class _Index(TypedDict):
    """The keys of model.safetensors.index.json that are read here."""

    weight_map: dict[str, PathText]


def from_pretrained(loader: Any, source: str | os.PathLike, what: str, remedy: str = "", **options: Any) -> Any:
    """`loader.from_pretrained(source)` of a class of transformers, which never runs code that `source` brings along.

    Args:
        source: a folder, which is checked before anything in it is opened, or a name on the Hugging Face Hub.
        what, remedy: name it in the error, and what to do.
        options: such as gguf_file (`gguf_option`).

    Raises:
        ValmError: it cannot be read, needs code of its own, or names files outside of its folder.
    """
    with library_errors(what, remedy), quiet_transformers():
        gguf = options.get("gguf_file")  # which has a config of its own
        if is_folder(source):
            check_folder(Path(source))
            return loader.from_pretrained(source, trust_remote_code=False, **options)
        files = CACHED if gguf is None else (gguf,)
        with _no_folder(os.fspath(source), files, what, remedy, options.get("local_files_only", False)):
            return loader.from_pretrained(source, trust_remote_code=False, **options)


def gguf_option(source: str | os.PathLike) -> tuple[str | os.PathLike, dict[str, str]]:
    """`source`, or the folder or the name on the Hugging Face Hub in which it is a GGUF file, and the option of
    `from_pretrained` that names this."""
    if not os.fspath(source).endswith(".gguf") or is_folder(source):
        return source, {}
    folder, file = os.path.split(source)
    return folder or os.curdir, {"gguf_file": file}


@contextmanager
def _no_folder(name: str, files: Iterable[str], what: str, remedy: str, only_cache: bool) -> Iterator[None]:
    """Says that there is no folder `name` before it is looked for on the Hugging Face Hub, which may take a minute, and
    in the error of the block.

    Raises:
        ValmError: `name` is none of the Hub's either, or the block raised an OSError.
    """
    missing = f"{what} cannot be read: there is no folder {name}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValmError(f"{missing}{remedy}") from None
    if only_cache and not _is_cached(name, files):  # transformers would ask the Hub all the same
        raise ValmError(f"{missing}, and it is not in the cache of the Hugging Face Hub{remedy}")
    if not _is_cached(name, files):
        log.warning("there is no folder %s: looking for it on the Hugging Face Hub", name)
    try:
        yield
    except OSError as error:  # also of requests
        reason = one_line((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise ValmError(f"{missing}, and {reason}{remedy}") from error


def _is_cached(name: str, files: Iterable[str]) -> bool:
    """Whether the cache of the Hugging Face Hub has one of these files of this name."""
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def check_folder(folder: Path) -> None:
    """Checks the names of weights that the files in the folder of a model give.

    Raises:
        ValmError: one leads out of the folder.
    """
    if is_file(folder / CONFIG_FILE):
        config = read_json(folder / CONFIG_FILE, "the config", dict[str, Any], REMEDY)
        # a file, or what a model of our own says to other classes
        _check_inside(folder / CONFIG_FILE, str(config.get("transformers_weights")))
    for index in folder.glob("*.index.json"):
        for name in read_json(index, "the index of weights", _Index, REMEDY)["weight_map"].values():
            _check_inside(index, name)


def _check_inside(file: Path, name: str) -> None:
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValmError(f"{file} names {short(name)}, which leads out of its folder")


@contextmanager
def library_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turns the many errors that transformers and tokenizers raise for damaged files into a ValmError of one sentence.

    Raises:
        ValmError: the block raised an error, but not for want of memory, or panicked in Rust.
    """
    try:
        yield
    except ValmError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or (not isinstance(error, Exception) and not is_panic(error)):
            raise
        if "trust_remote_code" in str(error):
            raise ValmError(f"{what} needs code of its own (auto_map), which is not run") from error
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValmError(f"{what} cannot be read: {one_line(first_line)}{remedy}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bar for every file and its table of weights that do not fit."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
