"""Builds a wheel, gives it a manylinux tag and tries it without a compiler: `make wheel`.

`python -m tests.wheel_check FOLDER` writes the wheel into FOLDER. The wheel is for this Python, without CUDA code.
auditwheel chooses the oldest manylinux whose libraries suffice. Releases are built in the containers that
pyproject.toml names for cibuildwheel.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sdist_check import ROOT, check_wheel, copy_checkout, install

# A bundled libgomp would be a second OpenMP runtime next to torch's. pyproject.toml repeats this line.
REPAIR = ("auditwheel", "repair", "--exclude", "libgomp.so.1")


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    os.environ["VALM_KERNELS_CUDA"] = "off"
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkout = copy_checkout(folder / "checkout")
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder / "built", checkout], check=True)
        (built,) = (folder / "built").iterdir()
        check_wheel(built)
        subprocess.run([*REPAIR, "--wheel-dir", folder / "repaired", built], check=True)
        (wheel,) = (folder / "repaired").iterdir()
        assert "manylinux" in wheel.name, f"auditwheel gave {wheel.name} no manylinux tag"
        check_wheel(wheel)  # auditwheel has added no library
        python = install(wheel, folder / "venv")
        environment = {**os.environ, "PATH": str(python.parent)}  # no compiler
        subprocess.run([python, "-I", ROOT / "tests" / "smoke.py"], cwd=folder, env=environment, check=True)
        target.mkdir(exist_ok=True)
        shutil.copy(wheel, target)
        print(f"{target / wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
