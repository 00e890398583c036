"""Builds a wheel, gives it a manylinux tag and tries it where there is no compiler: `make wheel`.

`python -m tests.wheel_check FOLDER` writes the wheel into FOLDER. It is for this Python, without CUDA code. auditwheel
chooses the oldest manylinux whose libraries suffice; a release is built in the containers that cibuildwheel names in
pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sdist_check import ROOT, check_wheel, copy_checkout, install

# A copy of libgomp in the wheel would be a second OpenMP runtime beside torch's. pyproject.toml has the same line.
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
        check_wheel(wheel)  # auditwheel has put no library into it
        python = install(wheel, folder / "venv")
        environment = {**os.environ, "PATH": str(python.parent)}  # no compiler
        subprocess.run([python, "-I", ROOT / "tests" / "smoke.py"], cwd=folder, env=environment, check=True)
        target.mkdir(exist_ok=True)
        shutil.copy(wheel, target)
        print(f"{target / wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
