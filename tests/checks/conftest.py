"""Fixtures of the checks of a build; at the end of a run, prints how much the checks tried."""

from tests.checks.counts import COUNTS
from tests.valm.conftest import clip, make_kb, tokenizer

__all__ = ["clip", "make_kb", "tokenizer"]


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.write_line("seen: " + ", ".join(f"{count:,} {what}" for what, count in sorted(COUNTS.items())))
