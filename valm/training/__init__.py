"""Training: `run_plan` runs a `TrainingPlan` to its end; `trainer` makes a Trainer for models that take images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valm.training.plan import TrainingPlan
    from valm.training.run import run_plan
    from valm.training.train import trainer, training_arguments

# The module of each name, imported on first use: commands that train nothing import only `valm.training.launch`.
_MODULES = {
    "TrainingPlan": "valm.training.plan",
    "run_plan": "valm.training.run",
    "trainer": "valm.training.train",
    "training_arguments": "valm.training.train",
}

__all__ = ["TrainingPlan", "run_plan", "trainer", "training_arguments"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'valm.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
