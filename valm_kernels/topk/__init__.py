"""Exact top-K inner product search."""

from valm_kernels.topk.api import ip_scores, ip_topk
from valm_kernels.topk.checks import MAX_TOPK
from valm_kernels.topk.index import FlatIPIndex
from valm_kernels.topk.result import TopK, merge_topk

__all__ = ["MAX_TOPK", "FlatIPIndex", "TopK", "ip_scores", "ip_topk", "merge_topk"]
