"""The Triton kernels go through Triton's own binder, compiler and C launcher without a GPU, and each parameter
arrives."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

import triton

from tests.checks.triton import on_fake_driver
from tests.checks.triton.compile_record import read_table


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of a libcuda.so.1 that runs nothing."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if triton.__version__ != read_table()[0]:
        pytest.skip(f"written for the launcher of Triton {read_table()[0]}, here is {triton.__version__}")
    folder = tmp_path_factory.mktemp("driver")
    on_fake_driver.build(folder)
    return folder


def checked(driver, *arguments, **environment):
    environment = on_fake_driver.environment(driver) | environment
    command = [sys.executable, "-m", "tests.checks.triton.on_fake_driver", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


@pytest.mark.slow  # it compiles
def test_every_kernel_is_launched_with_the_parameters_that_it_was_given(driver):
    launched, agree = checked(driver, "parameters")
    assert launched >= 30 and agree >= 20


@pytest.mark.slow
def test_repeated_launches_have_the_same_parameters_without_triton(driver):
    """Also for other alignments, strides, sizes and devices."""
    launched, by_triton = checked(driver, "repeated")
    assert by_triton < launched / 2


@pytest.mark.slow
def test_a_run_finds_what_tune_tiles_has_compiled(driver, tmp_path):
    launched, found = checked(driver, "cache", TRITON_CACHE_DIR=str(tmp_path))
    assert launched >= 5 and found >= 5
