"""Kernels of a visually-augmented language model: fused image attention and exact top-K inner product.

Names are imported on first use, so code that needs only files or the version does not wait for torch. Before you load a
saved `torch.export` program, import `valm_kernels.visual_fusion` or `valm_kernels.topk`, which registers its operator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .build_info import show_config
    from .topk import (
        MAX_TOPK,
        FlatIPIndex,
        NumpyTopK,
        TopK,
        ip_scores,
        ip_topk,
        merge_topk,
    )
    from .visual_fusion import (
        MAX_IMAGES,
        attention_weights,
        visual_fusion_attn,
        visual_fusion_attn_varlen,
    )

_MODULES = {
    "MAX_IMAGES": ".visual_fusion",
    "MAX_TOPK": ".topk",
    "FlatIPIndex": ".topk",
    "NumpyTopK": ".topk",
    "TopK": ".topk",
    "attention_weights": ".visual_fusion",
    "ip_scores": ".topk",
    "ip_topk": ".topk",
    "merge_topk": ".topk",
    "show_config": ".build_info",
    "visual_fusion_attn": ".visual_fusion",
    "visual_fusion_attn_varlen": ".visual_fusion",
}

__all__ = [
    "MAX_IMAGES",
    "MAX_TOPK",
    "FlatIPIndex",
    "NumpyTopK",
    "TopK",
    "__version__",
    "attention_weights",
    "ip_scores",
    "ip_topk",
    "merge_topk",
    "show_config",
    "visual_fusion_attn",
    "visual_fusion_attn_varlen",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
