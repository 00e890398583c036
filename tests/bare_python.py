"""A Python with PyTorch and Triton, but without the other packages that the tests and the whole package need.

It is a virtual environment whose packages are links to this environment's packages. A usual machine with a GPU has none
of HIDDEN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

PLUGINS = ("pytest_timeout", "pytest_xdist", "pytest_benchmark", "hypothesis")
BUILD = ("pybind11", "ninja")
PACKAGES = ("open_clip_torch", "transformers", "faiss_cpu", "usearch", "scipy")
HIDDEN = (*PLUGINS, *BUILD, *PACKAGES)


def bare_python(folder: Path, hidden: tuple[str, ...] = HIDDEN) -> Path:
    """The Python of a new virtual environment in `folder`, without the `hidden` distributions and without valm."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    source = Path(torch.__file__).parents[1]
    left_out = {"valm"}
    for distribution in distributions(path=[str(source)]):
        if distribution.name.lower().replace("-", "_") in hidden:
            left_out |= {Path(file).parts[0] for file in distribution.files or ()}
    for entry in source.iterdir():
        editable = entry.suffix == ".pth" or entry.name.startswith(("__editable__", "valm-"))
        if not editable and entry.name not in left_out and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def path_without(folder: Path, *programs: str) -> str:
    """A PATH with one new folder that contains links to all programs except these."""
    folder.mkdir()
    for place in os.get_exec_path():
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name not in programs and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)
