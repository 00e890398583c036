"""The checkpoint of a training of `take_steps`: one safetensors file, so nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import Sha256, exists, parse_json
from valm.store.settings import check_same
from valm.text import one_line
from valm_kernels.atomic_files import atomic_path

# Seconds between two checkpoints, or so many times as long as writing the last one took.
SAVE_SECONDS = 30.0
SAVE_RATIO = 10.0
REMEDY = "delete it to start again"


class _Note(TypedDict):
    """What the file's header says beside the tensors."""

    settings: dict[str, Any]
    losses: list[float]
    sha256: Sha256


class StepsCheckpoint:
    """Where a training is written every SAVE_SECONDS, and what a resumed one continues from.

    Attributes:
        losses: of the steps that the file has; empty if there is none.

    Args:
        settings: what decides the result, as JSON, each under the name that an error gives it. The steps themselves
            read data that depends on nothing else.

    Raises:
        ValmError: the file is damaged, or of a training with other settings.
    """

    def __init__(self, path: Path, model: nn.Module, settings: Mapping[str, Any]):
        self.path, self.model = path, model
        self.settings = dict(settings)
        self.losses: list[float] = []
        self._tensors: dict[str, Tensor] = {}
        self._due = time.monotonic() + SAVE_SECONDS
        if not exists(path):
            return
        note, self._tensors = _read(path)
        self.losses = note["losses"]
        remedy = "choose another folder, or resume with what it had"
        check_same(f"{path.parent} holds another training", note["settings"], self.settings, remedy)

    def restore(self, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> list[float]:
        """Sets the model, the optimizer, its schedule and torch's random numbers to what the file has, if there is one,
        and returns the losses up to there.

        Raises:
            ValmError: the file is of another model.
        """
        tensors, self._tensors = self._tensors, {}
        if not tensors:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the schedule steps before the optimizer
            for _ in self.losses:
                schedule.step()
        state: dict[int, dict[str, Tensor]] = {}
        for name in list(tensors):
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                state.setdefault(int(number), {})[key] = tensors.pop(name)
        torch.set_rng_state(tensors.pop("random"))
        try:
            self.model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
        except RuntimeError as error:
            raise ValmError(f"cannot resume from {self.path}: {one_line(str(error))}; {REMEDY}") from error
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return list(self.losses)

    def save_if_due(self, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Writes the state after the step of the last of `losses`, if SAVE_SECONDS are over.

        Raises:
            OSError, ValmError: the file cannot be written.
        """
        begin = time.monotonic()
        if begin < self._due:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
        # copies: safetensors refuses tensors that share memory
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in (tensors | {"random": torch.get_rng_state()}).items()
        }
        note: _Note = {"settings": self.settings, "losses": losses, "sha256": _sha256(tensors)}
        try:
            with atomic_path(self.path) as temporary:
                save_file(tensors, temporary, {"training": json.dumps(note)})
        except SafetensorError as error:  # of a full disk too
            raise ValmError(f"cannot write {self.path}: {one_line(str(error))}") from error
        self.losses = list(losses)
        self._due = time.monotonic() + max(SAVE_SECONDS, SAVE_RATIO * (time.monotonic() - begin))


def _read(path: Path) -> tuple[_Note, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            note = parse_json((file.metadata() or {}).get("training", "null"), _Note)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except Exception as error:  # safetensors raises its own for damaged bytes
        raise ValmError(f"cannot resume from {path}: {one_line(str(error))}; {REMEDY}") from error
    if _sha256(tensors) != note["sha256"]:
        raise ValmError(f"cannot resume from {path}: it differs from its checksum; {REMEDY}")
    return note, tensors


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over the names and the bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
