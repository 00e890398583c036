"""A random order of the tests, and a check that none leaves an event loop running."""

import asyncio
import os
import random
from collections.abc import Iterator

import pytest

SEED = os.environ.get("VALM_TEST_SEED")


def pytest_report_header() -> str | None:
    return SEED and f"modules, and the tests in each, are in the random order VALM_TEST_SEED={SEED}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffles modules, and the tests in each: a module's fixtures are still made once."""
    if SEED:
        generator = random.Random(SEED)
        generator.shuffle(items)
        modules = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: modules.index(item.path))


@pytest.fixture(autouse=True)
def no_running_event_loop() -> Iterator[None]:
    """In a thread with a running loop, such as one that Playwright's synchronous API left, every asyncio.run fails."""
    yield
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
