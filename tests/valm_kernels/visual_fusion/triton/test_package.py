import importlib.util
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

from valm_kernels.visual_fusion.triton import primitives


def test_a_folder_called_triton_hides_no_triton():
    assert primitives.triton is sys.modules["triton"]
    assert primitives.triton.__file__ != sys.modules["valm_kernels.visual_fusion.triton"].__file__
