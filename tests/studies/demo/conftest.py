import pytest

from studies.demo.things import Thing, load_things


@pytest.fixture(scope="session")
def all_things() -> list[Thing]:
    """Every object with a drawing, rendered once for all tests of the demo."""
    pytest.importorskip("resvg_py", reason="needs the extra [demo]")
    return load_things(progress=False)
