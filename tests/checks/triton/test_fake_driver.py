"""The Triton kernels go through Triton's own binder, compiler and C launcher without a GPU, and each parameter
arrives."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

import triton

from tests.checks.triton.compile_record import read_table

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of a libcuda.so.1 that runs nothing."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    if triton.__version__ != read_table()[0]:
        pytest.skip(f"written for the launcher of Triton {read_table()[0]}, here is {triton.__version__}")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*command, str(HERE / "fake_libcuda.c"), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def on_fake_driver(driver, *arguments, **environment):
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver)} | environment
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.checks.triton.on_fake_driver", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


@pytest.mark.slow  # it compiles
def test_every_kernel_is_launched_with_the_parameters_that_it_was_given(driver):
    launched, agree = on_fake_driver(driver, "parameters")
    assert launched >= 30 and agree >= 20


@pytest.mark.slow
def test_a_run_finds_what_tune_tiles_has_compiled(driver, tmp_path):
    launched, found = on_fake_driver(driver, "cache", TRITON_CACHE_DIR=str(tmp_path))
    assert launched >= 5 and found >= 5
