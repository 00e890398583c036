"""Saves an augmented model as an adapter: a small file with the fusion's weights and what identifies the base model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.model.attention import ImageFusion
from valm.model.augment import AugmentedCausalLM, become_augmented, check_loaded
from valm.model.card import write_card
from valm.model.config import MODEL_TYPE, FusionOptions
from valm.model.image_model import ImageModel
from valm.model.probe import attention_path, decoder_layers
from valm.model.sketch import gguf_file, named_weights, other_tensor, sketch
from valm.retrieval.source import RetrievalSource, places_folder, read_places, write_places
from valm.store.files import read_json, write_json
from valm.store.folders import current_files, replaced_files
from valm.store.pretrained import CONFIG_FILE
from valm.text import one_line

ADAPTER_FILE = "image_fusion.json"
WEIGHTS_FILE = "image_fusion.safetensors"
FORMAT_VERSION = 3


class _Version(TypedDict):
    format_version: int


class AdapterFile(_Version):
    """The content of ADAPTER_FILE. `base` is a Hugging Face name, or null if the base is a folder, whose path
    `write_places` notes. fusion and retrieval are as in the config of a whole model."""

    base: str | None
    fusion: FusionOptions
    retrieval: dict[str, Any] | None


def save_adapter(
    model: AugmentedCausalLM,
    folder: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    numbers: Mapping[str, float] | None = None,
    command: str | None = None,
) -> Path:
    """Saves what `augment` added to the base model.

    The folder also gets the paths of the images and of the base, relative to `folder` so that both can be moved
    together, and a model card. If the process is killed, `load_adapter` loads the old adapter or the new one. The base
    is not noted if the model was opened from a whole folder.

    Args:
        model: what `augment` returned, trained or not.
        folder: created if missing; an adapter in it is replaced.
        tokenizer: saved too; by default the base's tokenizer is opened with the adapter.
        numbers: measurements for the model card, by name. A card that the user wrote is never replaced.
        command: the command for the model card.

    Returns:
        The folder.

    Raises:
        ValmError: a weight of the base has changed since `augment` (it was trained, or a LoRA was merged into it); or
            the folder cannot be written, or contains a whole model.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = valm.augment(AutoModelForCausalLM.from_pretrained("base"), image_dim=512, num_images=4)
        >>> valm.save_adapter(model, "adapter").name
        'adapter'
    """
    options = model.fusion_options
    found, expected = sketch(model), options.sketch or {}
    if name := other_tensor(found, expected):
        if name not in found or name not in expected:
            raise ValmError(
                f"{name} {'was added' if name in found else 'is gone'} since the model was augmented, and an adapter "
                "cannot store that change: unload a LoRA and save it with PEFT, or merge it and save the whole model "
                "with save_pretrained"
            )
        raise ValmError(
            f"{name} has changed since the model was augmented, and an adapter does not contain it: save the whole "
            "model with save_pretrained"
        )
    folder = Path(folder)
    config = current_files(folder) / CONFIG_FILE
    if (
        config.is_file()
        and read_json(config, "the config", dict[str, Any], "delete it").get("model_type") == MODEL_TYPE
    ):
        raise ValmError(
            f"{folder} contains a whole model, which transformers would load instead of the adapter: choose another "
            "folder"
        )
    base = model.config.base_place
    if base and (file := gguf_file(model)):
        base = os.path.join(base, file)
    here = base is not None and os.path.exists(base)
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(model, options).items()}
    model.finder.note_source()
    description = {
        "format_version": FORMAT_VERSION,
        "base": None if here else base,
        "fusion": asdict(options),
        "retrieval": model.config.retrieval,
    }
    with replaced_files(folder, "the adapter") as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE)
        write_json(temporary / ADAPTER_FILE, description)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_places(model.finder.source, temporary, place=folder, base=base if here else None)
    write_card(model, folder, numbers=numbers, command=command, with_base=False)
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether `save_adapter` wrote the folder."""
    return (current_files(folder) / ADAPTER_FILE).is_file()


def adapter_base(folder: str | os.PathLike) -> str:
    """The base model that the adapter in `folder` names: a folder, a Hugging Face name, or a GGUF file in either.
    Raises ValmError if the adapter names no base."""
    base, place = _description(Path(folder))["base"], read_places(folder).get("base")
    if place is not None:
        beside = places_folder(folder) / place
        return str(beside.absolute() if beside.is_file() else beside.resolve())  # a GGUF file is a link in a cache
    if not base:
        raise ValmError(f"the adapter {folder} does not name its base model: give the model's folder or name as base")
    return base


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> AugmentedCausalLM:
    """Adds the adapter in `folder` to its base model, in place. If an error is raised, the model is unchanged.

    The base may be loaded in another precision, which the adapter's parameters then get too.

    Args:
        model: the base model that the adapter was made with.
        folder: written by `save_adapter`.

    Returns:
        `model`, augmented.

    Raises:
        ValmError: the adapter is damaged or belongs to another base, or `model` already takes images.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = valm.augment(AutoModelForCausalLM.from_pretrained("base"), image_dim=512, num_images=4)
        >>> folder = valm.save_adapter(model, "adapter")
        >>> model = valm.load_adapter(AutoModelForCausalLM.from_pretrained("base"), folder)
        >>> model.fusion_options.num_images
        4
    """
    folder = Path(folder)
    if isinstance(model, ImageModel):
        raise ValmError(
            f"the adapter {folder} is for a base model, but this {type(model).__name__} already takes images: give its "
            "base model"
        )
    described = _description(folder)
    options = described["fusion"]
    if type(model).__name__ != options.architecture:
        raise ValmError(
            f"the adapter {folder} belongs to a {options.architecture}, but the base model is a {type(model).__name__}"
        )
    check_loaded(model)
    layers = decoder_layers(model)
    if not -len(layers) <= options.layer < len(layers):
        raise ValmError(f"the adapter {folder} is for layer {options.layer}, but the base model has {len(layers)}")
    options = _of_this_base(model, options, folder)
    tensors = _stored_tensors(folder)
    _check_shapes(model, options, folder, tensors)
    RetrievalSource.of_config(described["retrieval"], folder)  # raises before the model is changed
    augmented = become_augmented(model, options)
    _set(augmented, tensors)
    augmented.config.retrieval = described["retrieval"]
    augmented.read_places(folder)
    return augmented


def load_weights(model: AugmentedCausalLM, folder: str | os.PathLike) -> None:
    """Sets the weights that `augment` added to `model` to those of the adapter in `folder`. Raises ValmError if the
    adapter's weights cannot be read or do not fit."""
    tensors = _stored_tensors(Path(folder))
    _check_shapes(model, model.fusion_options, Path(folder), tensors)
    _set(model, tensors)


@torch.no_grad()
def _set(model: AugmentedCausalLM, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(model, model.fusion_options).items():
        tensor.copy_(tensors[name])


def _check_shapes(model: PreTrainedModel, options: FusionOptions, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Checks the names and shapes of an adapter's tensors before they change the model. Raises ValmError if the tensors
    differ from the adapter's description."""
    try:
        with torch.device("meta"):
            fusion = ImageFusion(options).state_dict()
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise ValmError(f"{folder / ADAPTER_FILE} does not describe an adapter: {one_line(str(error))}") from error
    path = attention_path(model, options.layer)
    expected = {f"{path}.image_fusion.{name}": tensor for name, tensor in fusion.items()}
    for name in sorted({*tensors, *expected}):
        shapes = [tuple(some[name].shape) if name in some else None for some in (tensors, expected)]
        if shapes[0] != shapes[1]:
            weights = current_files(folder) / WEIGHTS_FILE
            raise ValmError(f"{name} in {weights} has shape {shapes[0]}, expected {shapes[1]}")


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    weights = current_files(folder) / WEIGHTS_FILE
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValmError(f"the weights {weights} cannot be read: {error}") from error


def _of_this_base(model: PreTrainedModel, options: FusionOptions, folder: Path) -> FusionOptions:
    """The options with the sketch of the base `model`. Raises ValmError if the adapter in `folder` belongs to another
    base."""
    expected = options.sketch or {}
    found = sketch(model)
    name = other_tensor(found, expected)
    if name is not None and other_tensor(found, expected, coarsely=True) is None:
        warnings.warn(
            f"the base model of the adapter {folder} is quantised, now or when the adapter was made, so its weights "
            "were compared only coarsely (to within their norm)",
            stacklevel=3,
        )
        name = None
    if name is not None:
        how = "has other values"
        if name not in found:
            how = "is missing"
        elif name not in expected:
            how = "is no tensor of that base"
        raise ValmError(
            f"the adapter {folder} belongs to another base model than {model.config.name_or_path or 'this one'}: "
            f"{name} {how}"
        )
    return replace(options, sketch=found)


def _description(folder: Path) -> AdapterFile:
    file = current_files(folder) / ADAPTER_FILE
    if not is_adapter(folder):
        raise ValmError(f"{folder} is no adapter: it contains no {ADAPTER_FILE}")
    what, remedy = "the adapter's description", "save the adapter again"
    version = read_json(file, what, _Version, remedy)["format_version"]
    if version != FORMAT_VERSION:
        raise ValmError(f"{file} has format_version {version}, expected {FORMAT_VERSION}")
    found = read_json(file, what, AdapterFile, remedy)
    try:
        found["fusion"] = FusionOptions(**found["fusion"])
    except (TypeError, ValmError) as error:
        raise ValmError(f"{file} does not describe an adapter: {error}; {remedy}") from error
    return found


def _tensors(model: PreTrainedModel, options: FusionOptions) -> dict[str, Tensor]:
    """The adapter's tensors by name in the layer, sharing memory with the model's."""
    weights = named_weights(decoder_layers(model)[options.layer])
    return {name: tensor.detach() for name, _, tensor in weights if "image_fusion." in name}
