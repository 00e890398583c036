import shutil
from pathlib import Path

import pytest

from tests.fuzz.mutations import COUNTS
from tests.valm.conftest import clip, make_kb, tokenizer

__all__ = ["clip", "make_kb", "tokenizer"]

STORES = Path(__file__).parents[1] / "fixtures" / "0.1.0"


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    return Path(shutil.copytree(STORES, tmp_path_factory.mktemp("fuzz") / "stores"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A file that no reader may open."""
    file = tmp_path_factory.mktemp("outside") / "secret"
    file.write_text('{"secret": "this is not to be read"}')
    return file


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.write_line("seen: " + ", ".join(f"{count:,} {what}" for what, count in sorted(COUNTS.items())))
