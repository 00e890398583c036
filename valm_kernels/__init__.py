"""Kernels of a visually-augmented language model: fused image attention and exact top-K inner product."""

from valm_kernels.config import show_config
from valm_kernels.topk import MAX_TOPK, FlatIPIndex, TopK, ip_scores, ip_topk, merge_topk
from valm_kernels.visual_fusion import MAX_IMAGES, attention_weights, visual_fusion_attn

__all__ = [
    "MAX_IMAGES",
    "MAX_TOPK",
    "FlatIPIndex",
    "TopK",
    "attention_weights",
    "ip_scores",
    "ip_topk",
    "merge_topk",
    "show_config",
    "visual_fusion_attn",
]
