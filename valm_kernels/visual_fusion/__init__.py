"""Fused image attention: one softmax over a query's text keys and its own images.

api.py contains the public functions, varlen.py the packed layout, checks.py the argument checks, reference.py the
executable specification, op.py the registration with torch.library, cpu.py and triton/ the implementations.
"""

from .api import attention_weights, visual_fusion_attn
from .checks import MAX_IMAGES
from .varlen import visual_fusion_attn_varlen

__all__ = ["MAX_IMAGES", "attention_weights", "visual_fusion_attn", "visual_fusion_attn_varlen"]
