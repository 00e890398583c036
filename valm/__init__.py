"""VaLM: a causal language model that attends to retrieved images (Wang et al. 2022)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from valm.model.registration import register_when_imported

if TYPE_CHECKING:
    from valm.clip.clip import Clip
    from valm.errors import ValmError
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.model.adapter import load_adapter, save_adapter
    from valm.model.augment import augment
    from valm.model.checkpoint import load, save_checkpoint
    from valm.model.config import ValmConfig
    from valm.model.gpt2 import VaLMForCausalLM
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.retriever import Retriever
    from valm_kernels import __version__

# The module of each public name, imported on first use: the command line sets up the process before torch is loaded,
# and prints --help without it.
_MODULES = {
    "Clip": "valm.clip.clip",
    "ContextEncoder": "valm.retrieval.context",
    "ImageKnowledgeBase": "valm.knowledge_base.store",
    "Retriever": "valm.retrieval.retriever",
    "VaLMForCausalLM": "valm.model.gpt2",
    "ValmConfig": "valm.model.gpt2",
    "ValmError": "valm.errors",
    "__version__": "valm_kernels",
    "augment": "valm.model.augment",
    "load": "valm.model.checkpoint",
    "load_adapter": "valm.model.adapter",
    "save_adapter": "valm.model.adapter",
    "save_checkpoint": "valm.model.checkpoint",
}

__all__ = [
    "Clip",
    "ContextEncoder",
    "ImageKnowledgeBase",
    "Retriever",
    "VaLMForCausalLM",
    "ValmConfig",
    "ValmError",
    "__version__",
    "augment",
    "load",
    "load_adapter",
    "save_adapter",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'valm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


register_when_imported()
