"""The device that a name means."""

from __future__ import annotations

import torch

from valm.errors import ValmError


def open_device(name: str, remedy: str = "drop --device, or give cpu") -> torch.device:
    """The device that torch calls `name`; "auto" is a GPU where torch has one, and else the CPU.

    Args:
        remedy: what the error message says to do.

    Raises:
        ValmError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValmError(f"there is no device {name!r} here ({reason}); {remedy}") from error
    return device


def device_of_tasks(name: str, gpus: int) -> torch.device:
    """The device that `name` means in the tasks of a Ray cluster, each of which sees only the `gpus` that it reserves.

    Raises:
        ValmError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if gpus > 0 else "cpu"
    device = open_device(name, "drop --gpus") if gpus > 0 else open_device(name)
    if device.type != "cpu" and gpus == 0:
        raise ValmError(f"--device {name} with --ray: a task has no GPU; give --gpus 1")
    return device
