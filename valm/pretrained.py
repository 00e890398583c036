"""Opens models and tokenizers of transformers: without code of others, from their own folder, errors in a sentence."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import logging

from valm.errors import ValmError, is_panic
from valm.files import check_all_regular, check_regular, is_file, is_folder, read_json
from valm.text import one_line
from valm_kernels.json_files import PathText, short

CONFIG_FILE = "config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# A config's keys for the number of its layers: n_layer, num_hidden_layers, encoder_layers, ...
LAYERS = r"(.*_)?(layers?|depth)"
# A model may have so many numbers however few its weights are: buffers, such as GPT-2's mask, are not stored ...
UNSTORED = 1 << 28
# ... and so many for each byte of its weights, which may be packed.
PACKED = 8


class _Index(TypedDict):
    """The keys of model.safetensors.index.json that are read here."""

    weight_map: dict[str, PathText]


def from_pretrained(loader: Any, source: str | os.PathLike, what: str, remedy: str = "", **options: Any) -> Any:
    """`loader.from_pretrained(source)` of a class of transformers, which never runs code that `source` brings along.

    Args:
        source: a folder, which is checked before anything in it is opened, or a name on the Hugging Face Hub.
        what, remedy: name it in the error, and what to do.

    Raises:
        ValmError: it cannot be read, needs code of its own, names files outside of its folder, or its config describes
            a model larger than its weights.
    """
    with library_errors(what, remedy), quiet_transformers():
        if is_folder(source):
            check_folder(Path(source))
            if hasattr(loader, "from_config"):
                _check_size(Path(source), loader)
        return loader.from_pretrained(source, trust_remote_code=False, **options)


def check_folder(folder: Path) -> None:
    """Checks all that transformers chooses from in the folder of a model.

    Raises:
        ValmError: a file is a pipe or a device, an index of weights leads out of the folder, or the config has more
            layers than there are weights.
    """
    check_all_regular(folder)
    for index in folder.glob("*.index.json"):
        for name in set(
            read_json(index, "the index of weights", _Index, "save the model again")["weight_map"].values()
        ):
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise ValmError(f"{index} names {short(name)}, which leads out of its folder")
            if (folder / name).exists():
                check_regular(folder / name)
    if is_file(folder / CONFIG_FILE):
        config = read_json(folder / CONFIG_FILE, "the config", dict[str, Any], "save the model again")
        check_sizes(folder / CONFIG_FILE, config, len(shapes_in(folder)) or None)


def check_sizes(file: Path, config: dict[str, Any], most: int | None, names: str = LAYERS, part: str = "") -> None:
    """Checks, before a config is used, that its numbers of layers are at most `most`, the number of tensors.

    Args:
        most: None checks nothing.
        names: regular expression of the keys that are checked.
        part: where in the config of `file` this one stands, for the error.

    Raises:
        ValmError: one is larger; building or even listing the layers would take all memory.
    """
    if most is None:
        return
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(file, value, most, names, f"{part}{key}.")
        sizes = [size for size in (value if isinstance(value, list) else [value]) if isinstance(size, int | float)]
        if max(sizes, default=0) > most and re.fullmatch(names, key):
            raise ValmError(
                f"{file} describes another model: {part}{key} is {short(value)}, but its weights have only {most}"
            )


def shapes_in(folder: Path) -> list[list[int]]:
    """The shapes of all weights in `folder`; none if they cannot be read without loading them."""
    shapes = []
    for file in _weight_files(folder):
        if file.suffix != ".safetensors":
            return []
        try:
            with safe_open(file, "pt") as opened:
                shapes += [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
        except (SafetensorError, OSError):  # which loading will report
            return []
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file()]


def _check_size(folder: Path, loader: Any) -> None:
    """Compares the size of the model that the config describes, built without memory, with the size of its weights.

    Raises:
        ValmError: the model is far larger; transformers would first make what the weights lack.
    """
    stored = sum(file.stat().st_size for file in _weight_files(folder))
    if stored == 0:
        return
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        with torch.device("meta"):
            model = loader.from_config(config, trust_remote_code=False)
    except RuntimeError as error:  # sizes beyond 64 bits
        raise ValmError(f"{folder / CONFIG_FILE} describes no model: {one_line(str(error))}") from error
    size = sum(math.prod(tensor.shape) for tensor in (*model.parameters(), *model.buffers()))
    if size > max(UNSTORED, PACKED * stored):
        raise ValmError(
            f"{folder / CONFIG_FILE} describes a model of {size:,} numbers, but its weights have only {stored:,} bytes"
        )


@contextmanager
def library_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turns the many errors that transformers and tokenizers raise for damaged files into a ValmError of one sentence.

    Raises:
        ValmError: the block raised an error, or panicked in Rust.
    """
    try:
        yield
    except ValmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValmError(f"{what} needs code of its own (auto_map), which is not run") from error
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValmError(f"{what} cannot be read: {one_line(first_line)}{remedy}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bar for every file and its table of weights that do not fit."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
