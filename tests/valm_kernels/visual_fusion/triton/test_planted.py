"""Faults planted in copies of the kernels, and which check notices them: the table of docs/results/gpu.md.

The same faults meet Triton's interpreter, the guarded interpreter and ttsem. test_interpreted.py starts the first two,
`make ttsem-check` the third. The fourth check of the table, of machine code, is in tests/checks/triton/test_wgmma.py.
"""

import os
import sys
from contextlib import nullcontext

import pytest
import torch

if "ttsem" not in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py with TRITON_INTERPRET=1, or by make ttsem-check", allow_module_level=True)

from tests.valm_kernels.visual_fusion.problems import assert_solves
from tests.valm_kernels.visual_fusion.triton.guarded_interpreter import guarded
from tests.valm_kernels.visual_fusion.triton.mutants import kernels_of, mutant
from tests.valm_kernels.visual_fusion.triton.small_tiles import use_small_tiles

UNDER_TTSEM = "ttsem" in sys.modules
STORE = "tl.store(p_l, b_lse, mask=m_row)"
# The last leaves the results of an interpreter right, which runs the programs of a launch one after the other.
PLANTED = {
    "a wrong stride": mutant("+ o_slot * stride[3]", "+ o_slot * stride[1]"),
    "a missing mask": mutant("m_n = m_n & (o_n < Tk)[:, None]", "pass", num_images=0),
    "a wrong bound": mutant("tl.minimum(o_t, Tq - 1)", "tl.minimum(o_t, Tq)", num_images=0),
    "a store into another program's row": mutant(
        STORE, f"{STORE.replace('p_l', 'p_l - 1').replace('m_row', 'm_row & (o_t > 0)')}; {STORE}",
        query_heads=1, kv_heads=1, num_queries=150, num_images=0,
    ),
}  # fmt: skip
OUTSIDE = {"guarded interpreter": "outside of every tensor", "ttsem": "past the end of the tensor"}
OF_ANOTHER = {"guarded interpreter": "what another program of the launch stores", "ttsem": "both touch element"}
# The message of each check that notices the fault. What the interpreter finds outside of a tensor is chance.
NOTICED = {
    "a wrong stride": dict.fromkeys(("interpreter", "guarded interpreter", "ttsem"), "^out: "),
    "a missing mask": OUTSIDE,
    "a wrong bound": OUTSIDE,
    "a store into another program's row": OF_ANOTHER,
}
CHECKS = ["ttsem"] if UNDER_TTSEM else ["interpreter", "guarded interpreter"]
MET = [(name, check) for name in PLANTED for check in CHECKS if check != "interpreter" or NOTICED[name] != OUTSIDE]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), MET)
def test_planted_faults_are_noticed(monkeypatch, tmp_path, name, check):
    problem = PLANTED[name].problem
    message = NOTICED[name].get(check)
    with kernels_of(PLANTED[name], monkeypatch, tmp_path) as modules:
        if not UNDER_TTSEM:
            use_small_tiles(monkeypatch, problem, modules["launch"], modules["forward"])
        with (
            guarded() if check == "guarded interpreter" else nullcontext(),
            pytest.raises(Exception, match=message) if message else nullcontext(),
        ):
            assert_solves("triton", problem, torch.float32, device="cuda" if UNDER_TTSEM else "cpu")
