"""Kernels of a visually-augmented language model: fused image attention and exact top-K inner product."""

from valm_kernels.build_info import show_config
from valm_kernels.topk import FlatIPIndex, TopK, ip_scores, ip_topk, merge_topk
from valm_kernels.visual_fusion import visual_fusion_attn

__all__ = ["FlatIPIndex", "TopK", "ip_scores", "ip_topk", "merge_topk", "show_config", "visual_fusion_attn"]
