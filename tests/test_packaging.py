"""The source distribution has what a build and a packager need, and one version is everywhere."""

import re
import subprocess
import sys
import tarfile
from email.parser import Parser

import pytest

import valm
import valm_kernels
from tests.sdist_check import ROOT, check_sdist, copy_checkout, sdist_files

# What builds and tests leave in a source tree.
LEFTOVERS = ("valm_kernels/_native.so", "csrc/__pycache__/a.cpython-310.pyc", "tests/__pycache__/b.cpython-310.pyc")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("compares the sdist with a git checkout, and this is none")
    folder = tmp_path_factory.mktemp("sdist")
    checkout = copy_checkout(folder / "checkout")
    for name in LEFTOVERS:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder / "dist"], cwd=checkout, capture_output=True, check=True)
    (archive,) = (folder / "dist").glob("valm-*.tar.gz")
    return archive


@pytest.mark.slow
def test_sdist_is_the_checkout_without_repository_files(sdist):
    check_sdist(sdist)


@pytest.mark.slow
def test_sdist_has_every_file_that_the_native_module_is_built_from(sdist):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {"setup.py", "pyproject.toml", "csrc/bindings.cpp"} | sources <= sdist_files(sdist)


@pytest.fixture
def metadata(sdist):
    with tarfile.open(sdist) as archive:
        (name,) = (name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        return Parser().parsestr(archive.extractfile(name).read().decode())


def test_one_version_in_packages_and_metadata(metadata):
    assert metadata["Version"] == valm.__version__ == valm_kernels.__version__


def test_the_documentation_names_every_extra_that_users_have(metadata):
    named = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/how-to/install.md").read_text(), re.MULTILINE)
    of_developers = {"test", "check", "docs", "dev"}
    assert {*named} == {*metadata.get_all("Provides-Extra")} - of_developers
