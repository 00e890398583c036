"""Caches the input of the fusion layer for a whole training.

If every weight below the fusion layer is frozen, as after `valm.augment`, the layer's input for a document stays the
same in every epoch. `cache_below` runs the lower layers once, writes their hidden states to files, and makes the
training start at the fusion layer (docs/how-to/data.md; benchmarks/valm/bench_augmented.py measures the saving).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from valm.clip.tokenizer import batches_by_length, padded
from valm.errors import ValmError
from valm.model.augment import fusion_layer
from valm.model.config import WEIGHTS_KEY
from valm.model.image_model import ImageModel
from valm.model.probe import decoder_layers, in_mode, probe_tokens
from valm.progress import progress_bar
from valm.store.files import is_transient, writable_folder
from valm.text import one_line
from valm.training.data import DocumentView, Places, at_places, document_lengths
from valm_kernels.atomic_files import atomic_path
from valm_kernels.json_files import check_own

VERSION = 3
# Tokens of one pass through the lower layers, padding included.
BATCH_TOKENS = 4096
# The name under which `Collator` and the model exchange the hidden states.
FUSION_INPUT = "fusion_input"


class FusionInput:
    """Makes `model` skip its layers below `layer` in a call with `fusion_input` (B, T, C).

    Other calls run all layers. `remove` restores the model.
    """

    def __init__(self, model: Any, layer: int):
        self._states: Tensor | None = None
        self._layers = decoder_layers(model)[:layer]
        self._hook = model.register_forward_pre_hook(self._take, with_kwargs=True)
        for below in self._layers:
            # patch the layer, not its class: transformers' loops read attributes of their layers
            below.forward = self._skip(below.forward)

    def remove(self) -> None:
        """Restores the model's own layers."""
        self._hook.remove()
        for below in self._layers:
            vars(below).pop("forward", None)  # may already be removed

    def _take(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # stays until the next call, because gradient checkpointing reruns layers in backward
        self._states = kwargs.get(FUSION_INPUT)
        # a copy, because `BaseDivergence` calls the model again with the same arguments
        return args, {name: value for name, value in kwargs.items() if name != FUSION_INPUT}

    def _skip(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        returns_tuple = False

        def skipping(*args: Any, **kwargs: Any) -> Any:
            nonlocal returns_tuple
            if self._states is None:
                output = forward(*args, **kwargs)
                returns_tuple = isinstance(output, tuple)
                return output
            return (self._states,) if returns_tuple else self._states

        return skipping


def start_from_cache(training: Trainer, model: Any, folder: str | os.PathLike) -> None:
    """The method cache_below: `cache_below` for the documents to train on and to evaluate on."""
    with training.args.main_process_first(desc="hidden states"):
        for name in ("train_dataset", "eval_dataset"):
            if (documents := getattr(training, name)) is not None:
                made = cache_below(model, documents, folder, progress=not training.args.disable_tqdm)
                setattr(training, name, made)


def cache_below(
    model: Any, documents: Any, folder: str | os.PathLike, *, layer: int | None = None, progress: bool = True
) -> DocumentView:
    """Computes the input of the fusion layer of `model` once for each document, and makes the model start from it.

    The hidden states go to a file in `folder`, 4 C bytes a token in float32. Its name identifies weights, tokens and
    dtype; an existing file is reused. The model is changed by `FusionInput`: train it on the result with a `Collator`.

    Args:
        model: what `valm.augment` returned, a `VaLMForCausalLM`, or with `layer` any decoder of transformers.
        documents: as `Collator` takes them, none longer than the model's context (see `blocks`).
        folder: created if missing.
        layer: by default, the fusion layer.

    Returns:
        The documents, each with its `fusion_input` (T, C) from the file; bfloat16 is stored as uint16.

    Raises:
        ValmError: a weight below the layer trains or dropout there is active, so the layer's input would change; the
            layers pass on more than hidden states; there are no documents; a file is damaged; or `folder` cannot be
            written.
    """
    layers = decoder_layers(model)
    layer = fusion_layer(model) if layer is None else layer % len(layers)
    if layer == 0:
        raise ValmError("the fusion layer is the first layer, so there is nothing below it to be cached")
    if len(documents) == 0:
        raise ValmError("there are no documents, so nothing below the fusion layer can be cached")
    _check_frozen(model, layer)
    lengths = document_lengths(documents)
    file = writable_folder(folder) / f"below-{_key(model, layer, documents)}.npy"
    dtype = np.dtype("uint16" if model.dtype == torch.bfloat16 else str(model.dtype).removeprefix("torch."))
    shape = (int(lengths.sum()), model.config.get_text_config(decoder=True).hidden_size)
    if not file.is_file():
        _write(model, layer, documents, lengths, file, shape, dtype, progress)
    check_own(file)
    states = open_array(file, shape, dtype)
    _install(model, layer)
    return DocumentView(documents, partial(_with_states, states, np.cumsum(lengths)))


def _with_states(states: np.ndarray, ends: np.ndarray, number: int, document: dict[str, Any]) -> dict[str, Any]:
    return document | {FUSION_INPUT: states[ends[number] - len(document["input_ids"]) : ends[number]]}


def fusion_input(states: Sequence[np.ndarray], places: Places, shape: tuple[int, int]) -> Tensor:
    """The hidden states (T, C) of documents at their places in a batch of `shape` (B, L): (B, L, C), 0 elsewhere."""
    batch = torch.from_numpy(at_places(states, places, shape, 0))
    return batch.view(torch.bfloat16) if batch.dtype == torch.uint16 else batch


class _Reached(Exception):
    """Ends a run at the layer and holds its input; the layers from there on need not run."""

    def __init__(self, states: Tensor):
        self.states = states


def _input_of(model: Any, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    """The layer's input (B, T, C) for tokens (B, T)."""

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    hook = decoder_layers(model)[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False, **no_images(model, ids))
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise ValmError(f"{type(model).__name__} does not run its layer {layer}")


def no_images(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a call of `model` on `ids` (B, T) that say there are no images."""
    options = getattr(model, "fusion_options", None)
    if options is None or options.num_images == 0:
        return {}
    return {
        "image_pool": torch.zeros(0, options.image_dim, device=ids.device, dtype=model.dtype),
        "image_index": torch.full((*ids.shape, options.num_images), -1, device=ids.device),
    }


def _probe_tokens(model: Any) -> tuple[Tensor, Tensor]:
    ids = probe_tokens(model)
    return ids, torch.ones_like(ids)


def _check_frozen(model: Any, layer: int) -> None:
    """Checks that training does not change the layer's input. Raises ValmError if a lower weight trains, or dropout is
    active."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with in_mode(model, training=True), torch.enable_grad(), torch.random.fork_rng():
        states, again = (_input_of(model, layer, *_probe_tokens(model)) for _ in range(2))
        reached: Sequence[Tensor | None] = ()
        if states.requires_grad and trained:
            reached = torch.autograd.grad(states.sum(), list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, reached, strict=False):
        if gradient is not None:
            raise ValmError(
                f"{name} is below layer {layer} and trains, so the layer's input cannot be cached: freeze it"
            )
    if not torch.equal(states, again):
        raise ValmError(
            f"dropout is active below layer {layer}, so the layer's input cannot be cached: set it to 0 in the config"
        )


def _key(model: Any, layer: int, documents: Any) -> str:
    """A hash of everything that the hidden states depend on."""
    config = model.config.to_diff_dict()
    config = config.get("base_config", config)
    # a model with images and its text-only baseline share the states, also before and after a training
    for name in (WEIGHTS_KEY, "use_cache", "pad_token_id"):
        config.pop(name, None)
    above = {id(parameter) for module in decoder_layers(model)[layer:] for parameter in module.parameters()}
    digest = hashlib.sha256(
        json.dumps([VERSION, layer, str(model.dtype), config], sort_keys=True, default=str).encode()
    )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and id(parameter) not in above:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for index in range(len(documents)):
        ids = np.asarray(documents[index]["input_ids"], np.int32)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _write(
    model: Any,
    layer: int,
    documents: Any,
    lengths: np.ndarray,
    file: Path,
    shape: tuple[int, int],
    dtype: np.dtype,
    progress: bool,
) -> None:
    ends = np.cumsum(lengths)
    with (
        in_mode(model, training=False),
        atomic_path(file) as temporary,
        progress_bar(total=shape[0], desc="hidden states", unit=" tokens", unit_scale=True, shown=progress) as bar,
    ):
        states = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # otherwise access to the map would raise a signal if the disk is full
            with open(temporary, "r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, os.path.getsize(temporary))
        for batch in batches_by_length(lengths, BATCH_TOKENS):
            ids, mask = padded([documents[index]["input_ids"] for index in batch])
            found = _input_of(model, layer, ids.to(model.device), mask.to(model.device)).cpu()
            found = found.view(torch.uint16) if found.dtype == torch.bfloat16 else found
            for index, row in zip(batch, found.numpy(), strict=True):
                states[ends[index] - lengths[index] : ends[index]] = row[: lengths[index]]
            bar.update(int(mask.sum()))
        states.flush()


@torch.no_grad()
def _install(model: Any, layer: int) -> None:
    """Installs `FusionInput` once and tests it on a few tokens. Raises ValmError if the model's output changes."""
    if (installed := getattr(model, "_fusion_input", None)) is not None:  # it may be for another layer
        installed.remove()
    if isinstance(model, ImageModel):
        model.finder.tells_apart(model.base_model)  # test it while no layer is skipped
    ids, mask = _probe_tokens(model)
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **no_images(model, ids)}
    installed = FusionInput(model, layer)
    try:
        with in_mode(model, training=False):
            expected = model(**call).logits
            found = model(**call, fusion_input=_input_of(model, layer, ids, mask)).logits
    except (TypeError, ValueError, AttributeError) as error:
        installed.remove()
        raise ValmError(f"the layers of {type(model).__name__} cannot be skipped: {error}") from error
    if not torch.equal(expected, found):
        installed.remove()
        raise ValmError(f"the layers of {type(model).__name__} pass on more than hidden states: they cannot be skipped")
    model._fusion_input = installed


def open_array(file: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """The array in `file`, memory-mapped.

    Raises:
        OSError: the file cannot be read.
        ValmError: the file is damaged, or shape or dtype differ.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many types for a damaged header
        if is_transient(error):
            raise
        raise ValmError(f"{file} is damaged: {one_line(str(error))}; delete it, and it is made again") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValmError(f"{file} contains {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    return array
