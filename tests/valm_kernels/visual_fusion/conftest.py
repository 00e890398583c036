import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic mode fills every torch.empty with NaN, so that an output nobody wrote is seen. Not where
    compute-sanitizer looks for reads of memory that nobody wrote (VALM_KERNELS_POISON=0)."""
    if os.environ.get("VALM_KERNELS_POISON") == "0":
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # torch.use_deterministic_algorithms would import torch._inductor too, whose compilers nothing here asks for
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)
