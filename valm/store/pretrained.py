"""Opens models and tokenizers of transformers: without code of others, from their own folder, errors in a sentence."""

from __future__ import annotations

import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from valm.errors import ValmError, is_out_of_memory, is_panic
from valm.store.files import check_all_regular, check_regular, exists, is_file, is_folder, read_json
from valm.text import one_line
from valm_kernels.json_files import PathText, short

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# A name on the Hugging Face Hub is cached if one of these files is.
CACHED = (CONFIG_FILE, "tokenizer_config.json", "tokenizer.json")
# Files of weights, in the order in which transformers looks for them; with .index.json, their list of shards.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# A config's keys for the length of a list that is made of them: n_layer, num_hidden_layers, attention_types, ...
LISTS = r"(.*_)?(layers?|depths?|blocks?|stages|stack|cycles|experts|codebooks|quantizers|attention_types)"
# Such a list may be that long however few the weights are: some of the keys are bounds, such as Qwen2's
# max_window_layers, and experts may be stored as one tensor.
FEW = 512
LABELS = 1 << 16
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
        options: such as gguf_file (`gguf_option`).

    Raises:
        ValmError: it cannot be read, needs code of its own, names files outside of its folder, or its config describes
            a model larger than its weights.
    """
    with library_errors(what, remedy), quiet_transformers():
        gguf = options.get("gguf_file")  # which has a config of its own
        if is_folder(source):
            check_folder(Path(source))
            if hasattr(loader, "from_config") and gguf is None:
                _check_size(Path(source), loader)
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
    """Checks all that transformers chooses from in the folder of a model.

    Raises:
        ValmError: a file is a pipe or a device, an index of weights leads out of the folder, or the config has far more
            layers or labels than there are weights.
    """
    check_all_regular(folder)
    for index in folder.glob("*.index.json"):
        for file in _shards(index):
            check_regular(file)
    if is_file(folder / CONFIG_FILE):
        check_lists(folder / CONFIG_FILE, _config(folder), shapes_of(weight_files(folder)))


def check_lists(file: Path, config: dict[str, Any], shapes: list[list[int]]) -> None:
    """Checks, before a config is used, that it has no more layers and the like than weights of `shapes` can have.

    Raises:
        ValmError: it has; building or even listing the layers would take all memory.
    """
    check_sizes(file, config, max(len(shapes), FEW), LISTS)
    check_sizes(file, config, LABELS, "num_labels")


def check_sizes(file: Path, config: dict[str, Any], most: int, names: str, part: str = "") -> None:
    """Checks that the numbers in a config are at most `most`.

    Args:
        names: regular expression of the keys that are checked.
        part: where in the config of `file` this one stands, for the error.

    Raises:
        ValmError: one is larger.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(file, value, most, names, f"{part}{key}.")
        if re.fullmatch(names, key) and max(_numbers(value), default=0) > most:
            raise ValmError(
                f"{file} describes another model: {part}{key} is {short(value)}, but its weights allow {most} at most"
            )


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in lists of lists."""
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def shapes_of(files: list[Path]) -> list[list[int]]:
    """The shapes of the tensors in files of weights, which are not loaded. A file that cannot be read has none: loading
    will report it."""
    shapes: list[list[int]] = []
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    shapes += [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
            else:
                tensors = torch.load(file, "meta", weights_only=True, mmap=zipfile.is_zipfile(file)).values()
                shapes += [list(tensor.shape) for tensor in tensors if isinstance(tensor, torch.Tensor)]
        except Exception:  # safetensors and PyTorch raise many
            continue
    return shapes


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_FILE, "the config", dict[str, Any], "save the model again")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads the weights in `folder` from.

    Raises:
        ValmError: an index names a file outside of its folder.
    """
    named = _config(folder).get("transformers_weights")  # a file, or what a model of our own says to other classes
    for name in (named, *WEIGHTS) if isinstance(named, str) else WEIGHTS:
        file = _named_by(folder / CONFIG_FILE, name)
        index = Path(f"{file}.index.json")
        if is_file(file):
            return _shards(file) if name.endswith(".index.json") else [file]
        if is_file(index):
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index of weights names and that exist."""
    names = read_json(index, "the index of weights", _Index, "save the model again")["weight_map"].values()
    files = [_named_by(index, name) for name in sorted(set(names))]
    return [file for file in files if exists(file)]


def _named_by(file: Path, name: str) -> Path:
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValmError(f"{file} names {short(name)}, which leads out of its folder")
    return file.parent / name


def _check_size(folder: Path, loader: Any) -> None:
    """Compares the size of the model that the config describes, built without memory, with the size of its weights.

    Raises:
        ValmError: the model is far larger; transformers would first make what the weights lack.
    """
    if not is_file(folder / CONFIG_FILE):
        return
    stored = sum(file.stat().st_size for file in weight_files(folder))
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
