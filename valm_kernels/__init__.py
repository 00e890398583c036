"""Kernels of a visually-augmented language model: fused image attention and exact top-K inner product."""

from valm_kernels.build_info import show_config
from valm_kernels.topk import MAX_TOPK, FlatIPIndex, NumpyTopK, TopK, ip_scores, ip_topk, merge_topk
from valm_kernels.version import __version__
from valm_kernels.visual_fusion import MAX_IMAGES, attention_weights, visual_fusion_attn

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
]
