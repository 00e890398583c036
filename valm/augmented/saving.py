"""An augmented model without its base: the fusion's own small file, and a note on which base it belongs to."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from valm.augmented.attention import FusionOptions
from valm.augmented.model import AugmentedCausalLM, become_augmented, fingerprint
from valm.augmented.probe import decoder_layers
from valm.errors import ValmError
from valm.files import atomic_path, read_json, writable_folder, write_json

ADAPTER_FILE = "image_fusion.json"
WEIGHTS_FILE = "image_fusion.safetensors"
FORMAT_VERSION = 1
# A base in another precision has nearly the same mean absolute values, another model has others.
FINGERPRINT_TOLERANCE = 0.01


def save_adapter(model: AugmentedCausalLM, folder: str | os.PathLike) -> Path:
    """Writes what `augment` added to the base model, and with unfreeze="block" the layer, into `folder`.

    The base is named as it was loaded, a folder relative to this one, so that both can be moved together. The note on
    what finds the images is written too (`ImageModel.save_note`), the description of the adapter last.

    Raises:
        ValmError: every weight was trained, so an adapter would not be the model; or the folder cannot be written.
    """
    options = FusionOptions(**model.config.valm)
    if options.unfreeze == "all":
        raise ValmError('with unfreeze="all" every weight was trained: save the whole model by save_pretrained')
    folder = writable_folder(folder)
    base = model.config.name_or_path
    if base and Path(base).is_dir():
        base = os.path.relpath(base, folder)
    (folder / ADAPTER_FILE).unlink(missing_ok=True)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in _tensors(model, options).items()}, temporary)
    model.save_note(folder)
    write_json(folder / ADAPTER_FILE, {"format_version": FORMAT_VERSION, "base": base, "fusion": asdict(options)})
    return folder


def adapter_base(folder: str | os.PathLike) -> str:
    """Where the adapter in `folder` says that its base model is: a folder or a Hugging Face name.

    Raises:
        ValmError: it does not say.
    """
    base = _description(Path(folder)).get("base")
    if not isinstance(base, str) or not base:
        raise ValmError(f"the adapter {folder} does not say which base model it belongs to: give it as base")
    beside = Path(folder) / base
    return str(beside.resolve()) if beside.is_dir() else base


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> AugmentedCausalLM:
    """Lets `model`, the base that the adapter in `folder` was made with, see images as that did. It is changed itself.

    Raises:
        ValmError: the adapter is damaged, or belongs to another base.
    """
    folder = Path(folder)
    description = _description(folder)
    try:
        options = FusionOptions(**description["fusion"])
    except (KeyError, TypeError) as error:
        raise ValmError(f"{folder / ADAPTER_FILE} does not describe an adapter: {error}") from error
    if type(model).__name__ != options.architecture:
        raise ValmError(
            f"the adapter {folder} belongs to a {options.architecture}, but the base model is a {type(model).__name__}"
        )
    layers = decoder_layers(model)
    if not -len(layers) <= options.layer < len(layers):
        raise ValmError(f"the adapter {folder} is for layer {options.layer}, but the base model has {len(layers)}")
    found = fingerprint(layers[options.layer])
    for name in sorted({*found, *options.fingerprint}):
        values = (found.get(name, math.inf), options.fingerprint.get(name, math.inf))
        if not math.isclose(*values, rel_tol=FINGERPRINT_TOLERANCE, abs_tol=1e-8):
            raise ValmError(
                f"the adapter {folder} belongs to another base model than {model.config.name_or_path or 'this one'}: "
                f"{name} of layer {options.layer} has other values"
            )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValmError(f"the weights {folder / WEIGHTS_FILE} cannot be read: {error}") from error
    augmented: Any = become_augmented(model, options)
    expected = _tensors(model, options)
    for name in sorted({*tensors, *expected}):
        shapes = [tuple(some[name].shape) if name in some else None for some in (tensors, expected)]
        if shapes[0] != shapes[1]:
            raise ValmError(f"{name} in {folder / WEIGHTS_FILE} has shape {shapes[0]}, expected {shapes[1]}")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    augmented._note_folder = str(folder)
    return augmented


def _description(folder: Path) -> dict[str, Any]:
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise ValmError(f"{folder} is no adapter: it has no {ADAPTER_FILE}")
    description: dict[str, Any] = read_json(file, "the adapter's description", dict[str, Any], "save the adapter again")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValmError(f"{file} has format_version {version}, expected {FORMAT_VERSION}")
    return description


def _tensors(model: PreTrainedModel, options: FusionOptions) -> dict[str, Tensor]:
    """The adapter's tensors, sharing memory with the model's, by their names in the layer."""
    state = decoder_layers(model)[options.layer].state_dict()
    return {name: tensor for name, tensor in state.items() if options.unfreeze == "block" or "image_fusion." in name}
