"""Registers VaLM with transformers' Auto classes as soon as those are imported.

`import valm` alone must be enough for `AutoModelForCausalLM.from_pretrained`. But importing transformers, and with it
torch, takes seconds, which `valm --help` should not, and the command line sets up the process before torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CONFIGS, MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
# For each module with an Auto class, our module that registers with it on import.
REGISTERED_BY = {CONFIGS: "valm.config", MODELS: "valm.auto_model"}


class _Loader(Loader):
    """Runs the module's own loader, then our import."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # The models import the configs first, and every config class reads the models, so ours are imported after both.
        other = REGISTERED_BY[CONFIGS] if module.__name__ == MODELS else MODELS
        if not _is_being_imported(other):
            importlib.import_module(REGISTERED_BY[module.__name__])


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTERED_BY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _is_being_imported(name: str) -> bool:
    return name in sys.modules and getattr(sys.modules[name].__spec__, "_initializing", False)


def are_models_imported() -> bool:
    """Whether the Auto classes of models are imported; our config checks this on import."""
    return MODELS in sys.modules and not _is_being_imported(MODELS)


def register_when_imported() -> None:
    """Registers with the Auto classes: now with those already imported, later with the others."""
    sys.meta_path.insert(0, _Finder())
    if CONFIGS in sys.modules:
        importlib.import_module(REGISTERED_BY[CONFIGS])
