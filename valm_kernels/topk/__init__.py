"""Exact top-K inner product search."""

from valm_kernels.topk.api import TopK, ip_topk, merge_topk
from valm_kernels.topk.index import FlatIPIndex

__all__ = ["FlatIPIndex", "TopK", "ip_topk", "merge_topk"]
