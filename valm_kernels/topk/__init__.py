"""Exact top-K inner product search."""

from .api import ip_scores, ip_topk
from .checks import MAX_TOPK
from .index import FlatIPIndex
from .result import NumpyTopK, TopK, merge_topk
from .sharded import ShardedIPIndex

__all__ = ["MAX_TOPK", "FlatIPIndex", "NumpyTopK", "ShardedIPIndex", "TopK", "ip_scores", "ip_topk", "merge_topk"]
