from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills every torch.empty with NaN, so that an output nobody wrote is seen."""
    # torch.use_deterministic_algorithms would import torch._inductor too, whose compilers nothing here asks for
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)
