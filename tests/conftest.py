"""A random order of the tests, a check that none leaves an event loop running, and a browser."""

import asyncio
import gc
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MOST_SECONDS = 2  # processor time of a test that is not slow, at most
OF_A_CARD = ("test_gpu.py", "test_cuda_gpu.py")
SEED = os.environ.get("VALM_TEST_SEED")
LONG_TIMEOUT = 1200  # seconds

# Modules and tests live until the end. Python's collector would traverse them many times during collection, and again
# at each full collection of a test.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # at exit, native modules report frozen objects as leaked


def pytest_report_header() -> str | None:
    return SEED and f"modules, and the tests in each, are in the random order VALM_TEST_SEED={SEED}"


def may_take_minutes(item: pytest.Item) -> bool:
    return any(mark.args[0] >= LONG_TIMEOUT for mark in item.iter_markers("timeout"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests that may take minutes first: at the end, other processes would wait for them. With SEED, shuffles the
    modules and the tests in each, so a module's fixtures are still made once."""
    items.sort(key=may_take_minutes, reverse=True)
    if SEED:
        generator = random.Random(SEED)
        generator.shuffle(items)
        modules = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: modules.index(item.path))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collects tests of a GPU only on a machine with a GPU."""
    if collection_path.name not in OF_A_CARD:
        return None
    import torch

    return None if torch.cuda.is_available() else True


def processor_seconds() -> float:
    """Processor seconds of this process and of the children that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _timed(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _timed(item, "call"))


def _timed(item: pytest.Item, phase: str) -> Iterator[None]:
    begin = processor_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append((phase, processor_seconds() - begin))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the processor seconds of each folder, and the tests that take too many."""
    folders: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                seconds = dict(report.user_properties)
                folders[os.path.dirname(report.nodeid.partition("::")[0])] += sum(seconds.values())
                tests[report.nodeid] += seconds["call"]
    terminalreporter.section("processor seconds")
    terminalreporter.line(f"{sum(folders.values()):7.1f}  all tests, with what they set up")
    for folder, seconds in folders.most_common():
        if seconds >= 1:
            terminalreporter.line(f"{seconds:7.1f}  {folder}")
    for test, seconds in tests.most_common():
        if seconds > MOST_SECONDS:
            terminalreporter.line(f"{seconds:7.1f}  {test} takes more than {MOST_SECONDS}: make it smaller, or slow")


@pytest.fixture(autouse=True)
def no_running_event_loop() -> Iterator[None]:
    """Checks that a test left no running event loop, as Playwright may: every later asyncio.run would fail."""
    yield
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


@pytest.fixture
def browser():
    """The system's Chromium, headless. Without Chromium or Playwright the test is skipped.

    For one test: Playwright's event loop runs in the test's thread for as long as the fixture lives.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, as in a container
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
