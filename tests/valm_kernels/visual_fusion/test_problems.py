from dataclasses import fields
from inspect import signature

import pytest

from tests.valm_kernels.visual_fusion.problems import PROBLEMS, QUICK, Problem
from valm_kernels import visual_fusion_attn
from valm_kernels.visual_fusion.inputs import Inputs


@pytest.mark.parametrize("field", fields(Problem), ids=lambda field: field.name)
def test_every_option_reaches_the_kernels_in_make_test(field):
    def sets(problems: dict[str, Problem]) -> bool:
        return any(getattr(problem, field.name) != field.default for problem in problems.values())

    assert sets(QUICK) == sets(PROBLEMS), (
        f"no problem in QUICK sets {field.name}, so make test does not run it in Triton's interpreter: move the "
        "smallest problem that does from PROBLEMS to QUICK"
    )


def test_every_argument_is_in_a_problem_of_make_test():
    default = {name: parameter.default for name, parameter in signature(visual_fusion_attn).parameters.items()}
    given = {
        name
        for problem in QUICK.values()
        for name, value in problem.inputs().items()
        if value is not None and value is not default[name]
    }
    missing = set(Inputs._fields) - given - {"max_seqlen"}  # test_varlen.py gives this bound
    assert not missing, f"no problem in QUICK gives {', '.join(sorted(missing))}: add a field to Problem, and a problem"
