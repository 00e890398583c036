import shutil
from pathlib import Path

import pytest

STORES = Path(__file__).parents[2] / "fixtures" / "0.1.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An hour for each test: thousands of mutants take minutes beside other work. A hang is still found."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    return Path(shutil.copytree(STORES, tmp_path_factory.mktemp("fuzz") / "stores"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A file that no reader may open."""
    file = tmp_path_factory.mktemp("outside") / "secret"
    file.write_text('{"secret": "this is not to be read"}')
    return file
