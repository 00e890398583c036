"""Fused image attention: one softmax over a query's text keys and its own images.

api.py has the public functions with every argument check, reference.py the executable specification, op.py the
registration with torch.library, cpu.py and triton/ the implementations.
"""

from valm_kernels.visual_fusion.api import MAX_IMAGES, attention_weights, visual_fusion_attn
from valm_kernels.visual_fusion.slots import sort_image_slots

__all__ = ["MAX_IMAGES", "attention_weights", "sort_image_slots", "visual_fusion_attn"]
