"""Finds the device for a name."""

from __future__ import annotations

import torch

from valm.errors import ValmError


def open_device(name: str) -> torch.device:
    """The device that torch calls `name`; "auto" is a GPU or else the CPU. Raises ValmError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValmError(f"there is no device {name!r} here ({reason}): drop --device, or give cpu") from error
    return device
