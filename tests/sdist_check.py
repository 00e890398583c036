"""Builds the source distribution and a wheel, and checks both as users install them: `make sdist-check`.

The script installs the sdist into a clean virtual environment and runs `tests/smoke.py` there, so valm and valm_kernels
come from the sdist only. Dependencies come from the environment that runs this script, because installing torch takes
longer than all the rest. The GitHub workflow installs the sdist with its dependencies.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Files about the repository itself: no build, test or reader of a release needs them.
NOT_IN_SDIST = (".ci/", ".github/", ".clang-format", ".gitignore", ".pre-commit-config.yaml")
# Written by setuptools.
GENERATED = ("PKG-INFO", "setup.cfg", "valm.egg-info/")
PACKAGES = ("valm/", "valm_kernels/")


def checkout_files() -> list[str]:
    """The files of this git checkout, with untracked files and without the files that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def copy_checkout(target: Path) -> Path:
    """Copies `checkout_files` to the new folder `target`, and returns it.

    A build in the checkout itself would also read the file list in valm.egg-info that an earlier build left there.
    """
    for name in checkout_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def sdist_files(sdist: Path) -> set[str]:
    """Files in the archive, relative to its top folder, without those in GENERATED."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in names if not name.startswith(GENERATED)}


def check_sdist(sdist: Path) -> None:
    """Raises AssertionError unless the archive holds the checkout without NOT_IN_SDIST."""
    compare(sdist, sdist_files(sdist), {name for name in checkout_files() if not name.startswith(NOT_IN_SDIST)})


def check_wheel(wheel: Path) -> None:
    """Raises AssertionError unless the wheel holds the files of both packages, among them py.typed and other data, the
    native module and its own dist-info, and nothing else."""
    native = f"valm_kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    compare(wheel, names, {name for name in checkout_files() if name.startswith(PACKAGES)} | {native})


def compare(archive: Path, found: set[str], expected: set[str]) -> None:
    missing, superfluous = sorted(expected - found), sorted(found - expected)
    assert not missing, f"{archive.name} lacks {', '.join(missing)}: add them to MANIFEST.in"
    assert not superfluous, f"{archive.name} has {', '.join(superfluous)}: exclude them in MANIFEST.in"


def install(archive: Path, environment: Path) -> Path:
    """Installs an sdist or a wheel into a new virtual environment, and returns the environment's Python."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # The dependencies only after the build, so that it cannot use one of them.
    subprocess.run([python, "-I", "-m", "pip", "install", "--quiet", "--no-deps", archive], check=True)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run([python, "-Ic", query], capture_output=True, text=True, check=True).stdout.strip()
    # A folder named in a .pth file has its own .pth files ignored: an editable valm in it is not importable.
    dependencies = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (Path(site_packages) / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return python


def main() -> None:
    os.environ["VALM_KERNELS_CUDA"] = "off"
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkout = copy_checkout(folder / "checkout")
        subprocess.run([sys.executable, "-m", "build", "--outdir", folder / "dist", checkout], cwd=folder, check=True)
        (sdist,), (wheel,) = ((folder / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
        check_sdist(sdist)
        check_wheel(wheel)
        python = install(sdist, folder / "venv")
        subprocess.run([python, "-I", ROOT / "tests" / "smoke.py"], cwd=folder, check=True)
        for file in (sdist, wheel):
            print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, files as expected")


if __name__ == "__main__":
    main()
