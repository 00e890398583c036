import shutil
from pathlib import Path

import pytest

STORES = Path(__file__).parents[2] / "fixtures" / "0.1.0"


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    return Path(shutil.copytree(STORES, tmp_path_factory.mktemp("fuzz") / "stores"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A file that no reader may open."""
    file = tmp_path_factory.mktemp("outside") / "secret"
    file.write_text('{"secret": "this is not to be read"}')
    return file
