"""Registers VaLM with transformers' `AutoConfig` as soon as that is imported.

`import valm` alone must be enough for `AutoModelForCausalLM.from_pretrained`. But importing transformers, and with it
torch, takes seconds, which `valm --help` should not, and the command line sets up the process before torch.
transformers has no entry points for packages like this one, so we wait for the import of its module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The module of AutoConfig, and ours that registers with it.
CONFIGS, OURS = "transformers.models.auto.configuration_auto", "valm.model.auto_config"


class _Loader(Loader):
    """Runs the module's own loader, then imports ours."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(OURS)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != CONFIGS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Registers with `AutoConfig`: now if it is imported, or else as soon as it is."""
    sys.meta_path.insert(0, _Finder())
    if CONFIGS in sys.modules:
        importlib.import_module(OURS)
