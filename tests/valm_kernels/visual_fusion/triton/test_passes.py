"""What Triton's passes make of the kernels, from their first IR to the last one above LLVM: `make ttsem-check`."""

import sys

import numpy as np
import pytest
import torch

if "ttsem" not in sys.modules:
    pytest.skip("run by make ttsem-check", allow_module_level=True)

from triton._C.libtriton import ir, passes
from triton.compiler import make_backend
from ttsem import harness, races, validate
from ttsem.interp2 import launch_config

from tests.valm_kernels.visual_fusion.problems import Problem, cotangents, solve

TARGET = harness.target_for("cpu", 90)
# Several tiles of text for one program, so that the buffers of its pipelined loads are used again.
SHAPE = {"batch": 1, "query_heads": 2, "kv_heads": 1, "num_queries": 300, "head_dim": 64, "num_images": 4}
LAUNCHED = {
    "dense": Problem(**SHAPE),
    "pooled": Problem(**SHAPE, pool_size=40),
    "decode": Problem(**{**SHAPE, "num_queries": 1}, prefix=700),
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=LAUNCHED)
def launches(request, dtype):
    """The launches of a forward and a backward, one of each kernel, with the IR that each pass received."""
    recorded = {}

    def keep(*arguments):
        found = record_launch(*arguments)
        recorded.setdefault(found.record.fn_name, found.record)
        return found

    record_launch = harness.record_launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "record_launch", keep)
        problem = LAUNCHED[request.param]
        inputs = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in problem.inputs(dtype).items()}
        solve(inputs, "triton", cotangents(problem))
    assert len(recorded) > 2
    return [(record, stages_of(record)) for record in recorded.values()]


def stages_of(record):
    """The pass and the module that it received, without modules that no pass has changed."""
    stages = validate.split_dump(harness.dump_for_launch(record, TARGET))
    above_llvm = [stage for stage in stages if "llvm.func" not in stage[1]]
    assert len(above_llvm) < len(stages)
    return [stage for stage, before in zip(above_llvm, [("", ""), *above_llvm], strict=False) if stage[1] != before[1]]


def results(record, module):
    found = harness.final_state(record, module)
    assert isinstance(found, dict), found
    return found


def test_no_pass_changes_a_result(launches, dtype):
    """Except that one pass makes three products of tf32 of a product of float32, which rounds otherwise."""
    rounds = dtype == torch.float32
    for record, stages in launches:
        assert len(stages) > 10
        first = results(record, stages[0][1])
        for name, module in stages[1:]:
            for argument, found in results(record, module).items():
                message = f"{record.fn_name}: {argument} before {name}"
                if rounds and found.dtype == np.float32:
                    largest = np.nanmax(np.abs(first[argument]), initial=0, where=np.isfinite(first[argument]))
                    np.testing.assert_allclose(found, first[argument], rtol=0, atol=1e-5 * largest, err_msg=message)
                else:
                    assert found.tobytes() == first[argument].tobytes(), message


def test_a_changed_module_changes_a_result(launches):
    record, stages = launches[0]
    product = '"arith.mulf"('
    module = stages[-1][1]
    assert product in module
    first, changed = (results(record, m) for m in (module, module.replace(product, '"arith.addf"(')))
    assert any(found.tobytes() != changed[name].tobytes() for name, found in first.items())


def with_barriers(module, path):
    """The module with the barriers that Triton's lowering to LLVM inserts, which its own passes do not show."""
    path.write_text(module)
    context = ir.context()
    ir.load_dialects(context)
    make_backend(TARGET).load_dialects(context)
    parsed = ir.parse_mlir_module(str(path), context)
    allocation = passes.analysis.allocation(parsed)  # which membar does not keep alive
    passes.analysis.membar(allocation).run()
    return str(parsed)


def races_in_shared_memory(record, module, monkeypatch):
    """The races of the last program, which reads most keys, and the interpreter that ran it."""
    made, config = [], launch_config(module)

    class LastProgram(races.RaceInterp):
        def __init__(self, module, memory, programs):
            super().__init__(module, memory, programs, *config)
            made.append(self)

        def run_grid(self, fn, args):
            self.run(fn, args, tuple(size - 1 for size in self.num_programs))

    monkeypatch.setattr(harness, "Interp", LastProgram)
    # ttsem 0.1.0 removes an access from a list by comparing arrays
    monkeypatch.setattr(races.Access, "__eq__", object.__eq__)
    failure = harness.execute(record, module).failure
    assert failure is None, failure
    (interpreter,) = made
    assert not interpreter.gaps, interpreter.gaps
    # ttsem 0.1.0 also reports two reads, as by two products of one factor, if the first is in flight
    return [race for race in interpreter.races if "w" in (race.first.kind, race.second.kind)], interpreter


def test_barriers_order_shared_memory(launches, tmp_path, monkeypatch):
    """Asynchronous copies and wgmma too; without barriers the same accesses race."""
    racing = []
    for record, stages in launches:
        module = with_barriers(stages[-1][1], tmp_path / "module.mlir")
        found, ran = races_in_shared_memory(record, module, monkeypatch)
        assert not found, f"{record.fn_name}: {found[0]}"
        without, _ = races_in_shared_memory(record, races.strip_barriers(module), monkeypatch)
        print(f"{record.fn_name}: {ran.barriers} barriers, {len(ran.accesses)} accesses, {len(without)} races without")
        if without:
            racing.append(record.fn_name)
    assert {"_forward_kernel", "_query_kernel"} <= set(racing)
