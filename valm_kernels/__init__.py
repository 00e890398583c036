"""Kernels of a visually-augmented language model: fused image attention and exact top-K inner product."""

from valm_kernels.visual_fusion import visual_fusion_attn

__all__ = ["visual_fusion_attn"]
