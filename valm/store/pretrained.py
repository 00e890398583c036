"""Opens models and tokenizers of transformers: without code of others, from their own folder, errors in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging
from typing_extensions import TypedDict

from valm.errors import ValmError, is_out_of_memory, is_panic
from valm.store.files import PathText, read_json
from valm.text import one_line
from valm_kernels.json_files import short

CONFIG_FILE = "config.json"
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
        if Path(source).is_dir():
            check_folder(Path(source))
        elif os.path.isabs(source) or os.fspath(source).startswith("."):  # no name on the hub
            raise ValmError(f"{what} cannot be read: there is no folder {source}{remedy}")
        return loader.from_pretrained(source, trust_remote_code=False, **options)


def gguf_option(source: str | os.PathLike) -> tuple[str | os.PathLike, dict[str, str]]:
    """`source`, or the folder or the name on the Hugging Face Hub in which it is a GGUF file, and the option of
    `from_pretrained` that names this."""
    if not os.fspath(source).endswith(".gguf") or Path(source).is_dir():
        return source, {}
    folder, file = os.path.split(source)
    return folder or os.curdir, {"gguf_file": file}


def check_folder(folder: Path) -> None:
    """Checks the names of weights that the files in the folder of a model give.

    Raises:
        ValmError: one leads out of the folder.
    """
    if (folder / CONFIG_FILE).is_file():
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
