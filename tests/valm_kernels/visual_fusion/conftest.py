import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turns on deterministic mode, which fills every torch.empty with NaN, so that tests see unwritten outputs. Not
    with VALM_KERNELS_POISON=0: then compute-sanitizer looks for reads of unwritten memory."""
    if os.environ.get("VALM_KERNELS_POISON") == "0":
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # torch.use_deterministic_algorithms would also import torch._inductor, which nothing here needs
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)
