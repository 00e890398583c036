"""A checkpoint folder: config, weights and tokenizer in Hugging Face's format, and where its images are."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.model.adapter import ADAPTER_FILE, adapter_base, adapter_dtype, is_adapter, load_adapter
from valm.model.card import CARD_FILE, write_card
from valm.model.config import MODEL_TYPE
from valm.model.gpt2 import VaLMForCausalLM
from valm.model.image_model import ImageModel
from valm.model.positions import positions
from valm.retrieval.source import ImageSource, write_places
from valm.store.files import read_json
from valm.store.folders import current_files, replaced_files
from valm.store.pretrained import CONFIG_FILE, from_pretrained, gguf_option, quiet_transformers
from valm_kernels.json_files import short

TOKENIZER_FILE = "tokenizer_config.json"


class ModelConfig(TypedDict, total=False):
    """The keys of config.json that are read here."""

    model_type: Any


def save_checkpoint(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    numbers: Mapping[str, float] | None = None,
    command: str | None = None,
) -> Path:
    """Writes `folder`; `load` and, after `import valm`, `AutoModelForCausalLM.from_pretrained` read it.

    If the process is killed at any point, `load` loads the old checkpoint or the new one (`replaced_files`).
    The tokenizer's model_max_length becomes the model's.

    Args:
        model: a transformers model, one that takes images or its text-only twin.
        state_dict: the weights, if they are not in the model itself (it is sharded).
        numbers, command: for the model card (`write_card`), which never replaces the user's own.

    Raises:
        OSError, ValmError: the folder cannot be written completely; the old checkpoint still loads.
    """
    folder = Path(folder)
    saved = with_length(tokenizer, model)
    with replaced_files(folder, "the checkpoint") as temporary, quiet_transformers():
        model.save_pretrained(temporary, state_dict=state_dict)
        (temporary / CARD_FILE).unlink(missing_ok=True)  # save_pretrained wrote it, and would replace the user's own
        saved.save_pretrained(temporary)
        if isinstance(model, ImageModel):
            write_places(model.finder.source, temporary, place=folder)
    if isinstance(model, ImageModel):
        write_card(model, folder, numbers=numbers, command=command)
    return folder


def with_length(tokenizer: PreTrainedTokenizerFast, model: Any) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` whose model_max_length is at most the model's."""
    saved = copy.copy(tokenizer)
    saved.model_max_length = min(saved.model_max_length, positions(model) or saved.model_max_length)
    return saved


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerFast, what: str = "the tokenizer") -> None:
    """Checks that the model has the tokenizer's vocabulary; `what` is the tokenizer in the error message.

    Raises:
        ValmError: it has another one.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    # a pretrained decoder may have rows to spare
    if len(tokenizer) > vocab_size or (isinstance(model, VaLMForCausalLM) and len(tokenizer) != vocab_size):
        raise ValmError(f"{what} has {len(tokenizer)} tokens, but the model's vocab_size is {vocab_size}")


def load(
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    kb: str | os.PathLike | None = None,
    clip: str | None = None,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
    query_dtype: torch.dtype | None = None,
    strict: bool = False,
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Loads a model that takes images: a VaLM, or an augmented decoder saved whole or as an adapter.

    The knowledge base and CLIP are where the folder notes them. They are opened on first use, or now if `kb`, `clip`,
    `query_dtype` or `allow_download` is given; a warning names what is missing. Without a knowledge base the model
    needs `image_pool` in each call.

    Args:
        folder: written by `save_checkpoint`, `save_pretrained` or `save_adapter`, with a tokenizer (an adapter's may be
            in the folder of its base model).
        base: folder or Hugging Face name of an adapter's base model, or a GGUF file in one of both
            (`folder/model.gguf`), if it has moved. A name that only the adapter's own file has is never downloaded.
        kb: where the knowledge base is. Another one of the same CLIP is named by a warning.
        clip: the CLIP, if it has moved from where the knowledge base or the folder notes it (see `Clip.load`). Another
            one is an error.
        allow_download: of the CLIP, as in `open_encoder`.
        query_dtype: precision of CLIP's text tower, as in `open_encoder`; by default that of the retriever that the
            model was saved with, if it was chosen.
        strict: raise an error instead of a warning when the model needs images and has none.

    Returns:
        The model, in eval mode and on `device`, and its tokenizer.

    Raises:
        ValmError: there is no complete checkpoint, or its config, weights, tokenizer, base model, knowledge base and
            CLIP do not belong together.
    """
    folder = Path(folder)
    if not Path(folder).is_dir():
        raise ValmError(f"there is no checkpoint folder {folder}")
    source: str | os.PathLike
    if is_adapter(folder):
        source = adapter_base(folder) if base is None else base
        model = load_adapter(_load_base(folder, source, by_user=base is not None), folder)
        source = folder if (folder / TOKENIZER_FILE).is_file() else source
    else:
        if base is not None:
            raise ValmError(f"{folder} is no adapter (it has no {ADAPTER_FILE}), so it takes no base model")
        source = current_files(folder)
        model = _load_whole(folder, source)
    tokenizer = _load_tokenizer(source, folder, local=base is None)
    check_vocabulary(model, tokenizer, f"the tokenizer in {source}")
    sees, of_images = model.fusion_options.num_images > 0, model.finder.source
    if not sees and kb is not None:
        raise ValmError(f"the model in {folder} sees no images (GPT-2*), so it takes no knowledge base")
    model = model.eval().to(device)
    model.strict = strict
    asked = any(option is not None for option in (kb, clip, query_dtype)) or (allow_download and of_images is not None)
    if sees and asked:
        options = {"clip": clip, "allow_download": allow_download, "device": device}
        _add_retriever(model, tokenizer, folder, kb, dtype=query_dtype, **options)
    elif sees and of_images is not None and (missing := of_images.missing()):
        warnings.warn(missing, stacklevel=2)
    return model, tokenizer


def _load_whole(folder: Path, files: Path) -> Any:
    if not (files / CONFIG_FILE).is_file():
        raise ValmError(f"{folder} is no checkpoint: it has no {CONFIG_FILE}")
    kind = read_json(files / CONFIG_FILE, "the config", ModelConfig, "save the checkpoint again").get("model_type")
    if kind != MODEL_TYPE:
        plain = isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        remedy = f": it sees no images until `valm train --base {folder}` trains it to" if plain else ""
        raise ValmError(f"{folder} holds a model of type {short(kind)}, expected {MODEL_TYPE!r}{remedy}")
    model, report = from_pretrained(
        AutoModelForCausalLM,
        files,
        f"the checkpoint {folder}",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    model.config.name_or_path = os.path.abspath(folder)
    model.read_places(folder)  # not in the place of the files
    wrong = [f"{name} {sorted(map(str, found))[0]}" for name, found in report.items() if found]
    if wrong:
        raise ValmError(f"the weights in {folder} are not those of its {CONFIG_FILE}: {'; '.join(wrong)}")
    return model


def load_decoder(source: str | os.PathLike) -> Any:
    """A pretrained decoder of transformers for training: always in float32.

    Args:
        source: its folder, or its name on the Hugging Face Hub.

    Raises:
        ValmError: it cannot be read, or lacks weights.
    """
    model, report = from_pretrained(
        AutoModelForCausalLM, source, f"the base model {source}", dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ValmError(f"the base model {source} has no weights for {missing[0]}")
    return model


def _load_base(folder: Path, base: str | os.PathLike, by_user: bool) -> Any:
    what = f"the base model {base} of the adapter {folder}"
    dtype = adapter_dtype(folder)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    base, gguf = gguf_option(base)
    return from_pretrained(
        AutoModelForCausalLM, base, what, "; give it as base", local_files_only=not by_user, **options, **gguf
    )


def _load_tokenizer(source: str | os.PathLike, folder: Path, local: bool) -> Any:
    what, remedy = f"the tokenizer of the checkpoint {folder}", "; save one there by save_pretrained"
    source, gguf = gguf_option(source)
    tokenizer = from_pretrained(AutoTokenizer, source, what, remedy, local_files_only=local, **gguf)
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise ValmError(f"{what} has the model_max_length {short(longest)}, expected a number{remedy}")
    return tokenizer


def _add_retriever(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, kb: Any, **options: Any) -> None:
    source = model.finder.source
    if kb is None and source is None:
        raise ValmError(f"{folder} names no knowledge base: give it as kb (--kb)")
    if source is None:
        warnings.warn(f"{folder} does not say how it retrieves: it is opened with 'eot' queries", stacklevel=3)
        source = ImageSource("eot")
    if kb is not None:
        source = replace(source, knowledge_base=Path(kb).absolute(), clip=None)
    retriever = model.finder.open(source, tokenizer, **options)
    try:
        model.finder.set_retriever(retriever, chosen=options["dtype"] is not None)
    except ValmError as error:
        place = source.knowledge_base or source.clip
        raise ValmError(f"the model in {folder} and the knowledge base {place} do not fit: {error}") from error
