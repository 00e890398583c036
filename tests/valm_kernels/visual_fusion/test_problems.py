from dataclasses import fields

import pytest

from tests.valm_kernels.visual_fusion.problems import PROBLEMS, QUICK, Problem


@pytest.mark.parametrize("field", fields(Problem), ids=lambda field: field.name)
def test_every_option_reaches_the_kernels_in_make_test(field):
    def sets(problems: dict[str, Problem]) -> bool:
        return any(getattr(problem, field.name) != field.default for problem in problems.values())

    assert sets(QUICK) == sets(PROBLEMS), (
        f"no problem in QUICK sets {field.name}, so make test does not run it in Triton's interpreter: move the "
        "smallest problem that does from PROBLEMS to QUICK"
    )
