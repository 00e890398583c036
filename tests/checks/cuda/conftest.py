from tests.csrc.topk.cuda.conftest import library, simulate

__all__ = ["library", "simulate"]
