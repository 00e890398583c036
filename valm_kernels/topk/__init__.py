"""Exact top-K inner product search."""

from .api import ip_scores, ip_topk
from .checks import MAX_TOPK
from .index import FlatIPIndex
from .result import NumpyTopK, TopK, merge_topk

__all__ = ["MAX_TOPK", "FlatIPIndex", "NumpyTopK", "TopK", "ip_scores", "ip_topk", "merge_topk"]
