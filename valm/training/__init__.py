"""Training: `trainer` makes a transformers Trainer for models that take images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valm.training.train import trainer, training_arguments

__all__ = ["trainer", "training_arguments"]


def __getattr__(name: str) -> Any:
    # on first use: commands that train nothing import `valm.training.launch` alone
    if name not in __all__:
        raise AttributeError(f"module 'valm.training' has no attribute {name!r}")
    return getattr(importlib.import_module("valm.training.train"), name)
