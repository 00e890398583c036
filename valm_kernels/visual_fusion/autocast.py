"""torch.autocast around the kernels, which choose their precisions themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device_type: str) -> AbstractContextManager:
    if is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def is_autocast_enabled(device_type: str) -> bool:
    # PyTorch raises for a device without autocast, such as "meta"
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
