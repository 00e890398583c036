"""Exact top-K inner product search."""

from valm_kernels.topk.api import ip_scores, ip_topk
from valm_kernels.topk.checks import MAX_TOPK
from valm_kernels.topk.index import FlatIPIndex
from valm_kernels.topk.result import NumpyTopK, TopK, merge_topk
from valm_kernels.topk.sharded import ShardedIPIndex

__all__ = ["MAX_TOPK", "FlatIPIndex", "NumpyTopK", "ShardedIPIndex", "TopK", "ip_scores", "ip_topk", "merge_topk"]
