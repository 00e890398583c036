import shutil
from pathlib import Path

import pytest

from tests.valm.stores import make_stores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allows an hour for each test: thousands of mutants take minutes on a busy machine. A hang is still found."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def whole_stores(tmp_path_factory) -> Path:
    """The stores; no test may change them."""
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    return make_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def stores(whole_stores, tmp_path_factory) -> Path:
    return Path(shutil.copytree(whole_stores, tmp_path_factory.mktemp("fuzz") / "stores"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A file that no reader may open."""
    file = tmp_path_factory.mktemp("outside") / "secret"
    file.write_text('{"secret": "this is not to be read"}')
    return file
