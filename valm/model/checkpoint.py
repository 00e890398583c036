"""A checkpoint folder: config, weights and tokenizer in Hugging Face's format, and the paths of its images."""

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
from valm.model.adapter import ADAPTER_FILE, adapter_base, is_adapter, load_adapter
from valm.model.card import CARD_FILE, write_card
from valm.model.config import MODEL_TYPE
from valm.model.gpt2 import VaLMForCausalLM
from valm.model.image_model import ImageModel
from valm.model.positions import positions
from valm.retrieval.source import RetrievalSource, write_places
from valm.store.files import read_json
from valm.store.folders import current_files, replaced_files
from valm.store.parts import MODEL, part_of
from valm.store.pretrained import CONFIG_FILE, from_pretrained, gguf_option, quiet_transformers
from valm_kernels.json_files import short

TOKENIZER_FILE = "tokenizer_config.json"


class ModelConfig(TypedDict, total=False):
    """The keys of config.json that this module reads."""

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
    """Saves a model with its tokenizer, the paths of its images and a model card.

    `valm.load` loads the folder, and so does `AutoModelForCausalLM.from_pretrained` after `import valm`. If the process
    is killed, the folder contains the old checkpoint or the new one.

    Args:
        model: a model that takes images, or its text-only baseline.
        tokenizer: the model's tokenizer; it is saved with the model's length as model_max_length.
        folder: created if missing; a checkpoint in it is replaced.
        state_dict: the weights, if the model is sharded and does not hold them.
        numbers: measurements for the model card, by name. A card that the user wrote is never replaced.
        command: the command for the model card.

    Returns:
        The folder.

    Raises:
        OSError, ValmError: the folder cannot be written completely; the old checkpoint still loads.

    Example:
        >>> model, tokenizer = valm.load("model")
        >>> folder = valm.save_checkpoint(model, tokenizer, "saved", numbers={"eval_loss": 2.5})
        >>> (folder / "README.md").is_file()  # the model card
        True
    """
    folder = Path(folder)
    saved = with_length(tokenizer, model)
    with replaced_files(folder, "the checkpoint") as temporary, quiet_transformers():
        model.save_pretrained(temporary, state_dict=state_dict)
        (temporary / CARD_FILE).unlink(missing_ok=True)  # save_pretrained wrote it; it would replace the user's card
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
    """Checks that the vocabularies of model and tokenizer fit; `what` names the tokenizer in the error message. Raises
    ValmError if the vocabularies differ."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    # a pretrained decoder may contain unused rows
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

    The folder notes where the knowledge base and CLIP are. They are opened on first use, or immediately if `kb`,
    `clip`, `query_dtype` or `allow_download` is given; a warning names what is missing. Without a knowledge base, pass
    `image_pool` and `image_index` to each call.

    Args:
        folder: written by `save_checkpoint`, `save_pretrained` or `save_adapter`, with a tokenizer, or by
            `valm pictures`. An adapter's tokenizer may be in the folder of its base model.
        base: where an adapter's base model is, if it has moved: a folder, a Hugging Face name, or a GGUF file in either
            (`folder/model.gguf`). A name that only the adapter's file contains is not downloaded without
            allow_download.
        kb: folder of the knowledge base, if it has moved. Another knowledge base of the same CLIP raises a warning.
        clip: where the CLIP is, if it has moved (see `Clip.load`). Another CLIP is rejected.
        allow_download: load the CLIP that the knowledge base names, and the base that an adapter names, from the hub.
        device: where the model and CLIP run.
        query_dtype: precision of CLIP's text tower, as in `open_encoder`. Default: the precision that was chosen for
            the model's retriever before the model was saved.
        strict: raise an error instead of a warning if the model needs images and has none.

    Returns:
        The model, in eval mode and on `device`, and its tokenizer.

    Raises:
        ValmError: the folder is no complete checkpoint, or its config, weights, tokenizer, base model, knowledge base
            and CLIP do not belong together.

    Example:
        >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(ids).logits.shape  # (B, T, V); the retriever finds the images
        torch.Size([1, 3, ...])
    """
    folder, local = part_of(folder, MODEL), base is None and not allow_download
    if not folder.is_dir():
        raise ValmError(f"there is no checkpoint folder {folder}")
    source: str | os.PathLike
    if is_adapter(folder):
        source = adapter_base(folder) if base is None else base
        model = load_adapter(_load_base(folder, source, local=local), folder)
        source = folder if (folder / TOKENIZER_FILE).is_file() else source
    else:
        if base is not None:
            raise ValmError(f"{folder} is no adapter (it contains no {ADAPTER_FILE}), so it takes no base model")
        source = current_files(folder)
        model = _load_whole(folder, source)
    tokenizer = _load_tokenizer(source, folder, local=local)
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
        raise ValmError(f"{folder} is no checkpoint: it contains no {CONFIG_FILE}")
    kind = read_json(files / CONFIG_FILE, "the config", ModelConfig, "save the checkpoint again").get("model_type")
    if kind != MODEL_TYPE:
        plain = isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        remedy = f": add images to it with `valm train --base {folder}`" if plain else ""
        raise ValmError(f"{folder} contains a model of type {short(kind)}, expected {MODEL_TYPE!r}{remedy}")
    model, report = from_pretrained(
        AutoModelForCausalLM,
        files,
        f"the checkpoint {folder}",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    model.config.name_or_path = os.path.abspath(folder)
    model.read_places(folder)  # not from `files`
    wrong = [f"{name} {sorted(map(str, found))[0]}" for name, found in report.items() if found]
    if wrong:
        raise ValmError(f"the weights in {folder} do not fit its {CONFIG_FILE}: {'; '.join(wrong)}")
    return model


def load_decoder(source: str | os.PathLike) -> Any:
    """A pretrained decoder of transformers in float32, for training.

    Args:
        source: its folder, or its name on the Hugging Face Hub.

    Raises:
        ValmError: the model cannot be loaded or lacks weights.
    """
    model, report = from_pretrained(
        AutoModelForCausalLM, source, f"the base model {source}", dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ValmError(f"the base model {source} contains no weights for {missing[0]}")
    return model


def _load_base(folder: Path, base: str | os.PathLike, local: bool) -> Any:
    what = f"the base model {base} of the adapter {folder}"
    remedy = (
        "; put it back, allow its download (--allow-download), or note where it is: model, _ = valm.load(ADAPTER, "
        "base=BASE); valm.save_adapter(model, ADAPTER)"
    )
    base, gguf = gguf_option(base)
    return from_pretrained(AutoModelForCausalLM, base, what, remedy, local_files_only=local, **gguf)


def _load_tokenizer(source: str | os.PathLike, folder: Path, local: bool) -> Any:
    what, remedy = f"the tokenizer of the checkpoint {folder}", "; save a tokenizer there with save_pretrained"
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
        warnings.warn(f"{folder} does not name its kind of queries: 'eot' queries are used", stacklevel=3)
        source = RetrievalSource("eot")
    if kb is not None:
        source = replace(source, knowledge_base=Path(kb).absolute(), clip=None)
    retriever = model.finder.open(source, tokenizer, **options)
    try:
        model.finder.set_retriever(retriever, chosen=options["dtype"] is not None)
    except ValmError as error:
        place = source.knowledge_base or source.clip
        raise ValmError(f"the model in {folder} and the knowledge base {place} do not fit: {error}") from error
