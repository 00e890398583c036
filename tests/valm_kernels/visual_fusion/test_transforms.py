import pytest

from tests.valm_kernels.visual_fusion import transforms


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", transforms.PROBLEMS)
def test_first_derivatives_and_batches(name):
    transforms.assert_transforms("cpu", transforms.PROBLEMS[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", transforms.PROBLEMS)
def test_forward_mode_and_second_derivatives_raise(name):
    transforms.assert_raises_where_it_has_no_derivative("cpu", transforms.PROBLEMS[name])


@pytest.mark.parametrize("name", transforms.PROBLEMS)
def test_functionalization_and_export(name):
    transforms.assert_functionalizes_and_exports("cpu", transforms.PROBLEMS[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_compile():
    transforms.assert_transforms_compile("cpu", transforms.PROBLEMS["pooled"])
