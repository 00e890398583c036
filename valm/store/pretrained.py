"""Opens models and tokenizers of transformers: without foreign code, only from their folder, errors in one sentence."""

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
    """The keys of model.safetensors.index.json that this module reads."""

    weight_map: dict[str, PathText]


def from_pretrained(loader: Any, source: str | os.PathLike, what: str, remedy: str = "", **options: Any) -> Any:
    """`loader.from_pretrained(source)` of a class of transformers, without running code from `source`.

    Args:
        source: a folder, which is checked before its files are opened, or a name on the Hugging Face Hub.
        what, remedy: what the source is, and what to do, for the error.
        options: such as gguf_file (`gguf_option`).

    Raises:
        ValmError: the source cannot be read, needs its own code, or names files outside of its folder.
    """
    with library_errors(what, remedy), quiet_transformers():
        if Path(source).is_dir():
            check_folder(Path(source))
        elif os.path.isabs(source) or os.fspath(source).startswith("."):  # not a name on the hub
            raise ValmError(f"{what} cannot be read: there is no folder {source}{remedy}")
        return loader.from_pretrained(source, trust_remote_code=False, **options)


def gguf_option(source: str | os.PathLike) -> tuple[str | os.PathLike, dict[str, str]]:
    """`source` without options; or, if it is a GGUF file, its folder or name on the Hugging Face Hub, and the option of
    `from_pretrained` that names the file."""
    if not os.fspath(source).endswith(".gguf") or Path(source).is_dir():
        return source, {}
    folder, file = os.path.split(source)
    return folder or os.curdir, {"gguf_file": file}


def check_folder(folder: Path) -> None:
    """Raises ValmError if the files of a model's folder name weights outside of it."""
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE, "the config", dict[str, Any], REMEDY)
        # a file name, or a remark for other classes in our own models
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
        ValmError: the block raised an error (other than a MemoryError), or panicked in Rust.
    """
    try:
        yield
    except ValmError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or (not isinstance(error, Exception) and not is_panic(error)):
            raise
        if "trust_remote_code" in str(error):
            raise ValmError(f"{what} needs code of its own (auto_map), which valm does not run") from error
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValmError(f"{what} cannot be read: {one_line(first_line)}{remedy}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars and its table of weights that do not fit."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
