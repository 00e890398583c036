"""Registers the configs of models with images with transformers' `AutoConfig` as soon as that is imported.

After `import valm`, `AutoModelForCausalLM.from_pretrained` must load models with images. But importing transformers
here would import torch. That takes seconds, which `valm --help` must not, and the command line must first set up the
process. transformers offers no entry points for packages, so we wait for the import of its module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# The module of AutoConfig.
CONFIGS = "transformers.models.auto.configuration_auto"


class _Loader(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != CONFIGS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Registers with `AutoConfig` now if it is imported, or else as soon as it is."""
    sys.meta_path.insert(0, _Finder())
    if CONFIGS in sys.modules:
        _register()


def _register() -> None:
    """Registers a config class that imports ours when a config is read. transformers' modules of configs and models,
    which ours import, may be only half imported now."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import AutoConfig

    class SavedConfig(PreTrainedConfig):
        """The config in a file of model_type "valm"."""

        model_type = "valm"

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # of `AutoConfig.for_model`
            from valm.model.config import ValmConfig

            return ValmConfig(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            from valm.model.gpt2 import open_config

            return open_config(config_dict, **kwargs)

    AutoConfig.register(SavedConfig.model_type, SavedConfig)
