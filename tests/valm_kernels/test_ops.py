"""Several copies of valm_kernels in one process, as a kernel hub loads them: each has operators of its own."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import valm_kernels
from tests.valm_kernels.visual_fusion.problems import DIFFERENTIABLE, PROBLEMS
from tests.valm_kernels.visual_fusion.test_op import op_arguments

PACKAGE = Path(valm_kernels.__file__).parent
# Names that a hub or another package may give a copy, and the operators' namespaces that follow from them.
COPIES = {"_valm_kernels_cpu_0a1b2c": "_valm_kernels_cpu_0a1b2c", "1f.vendored": "_1f_vendored"}
sys.modules["1f"] = ModuleType("1f")


def load(name: str, folder: Path) -> ModuleType:
    """Imports the package in `folder` under another name; its submodules follow."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=COPIES)
def copy(request, tmp_path_factory):
    """A second and a third copy, with native code."""
    folder = tmp_path_factory.mktemp("copy") / "kernel"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return load(request.param, folder)


def gradients(package: ModuleType, inputs: dict, **options) -> tuple[torch.Tensor, ...]:
    leaves = [inputs[name] for name in DIFFERENTIABLE if inputs.get(name) is not None]
    out = package.visual_fusion_attn(**inputs, **options)
    return (out, *torch.autograd.grad(out.square().sum(), leaves))


@pytest.fixture
def inputs():
    made = PROBLEMS["pooled"].inputs(torch.float32)
    return {k: v.requires_grad_() if k in DIFFERENTIABLE and v is not None else v for k, v in made.items()}


def test_copies_compute_the_same(copy, inputs):
    assert copy.visual_fusion_attn is not valm_kernels.visual_fusion_attn
    for ours, theirs in zip(gradients(valm_kernels, inputs), gradients(copy, inputs), strict=True):
        assert torch.equal(ours, theirs)
    rows = torch.arange(50 * 16).reshape(50, 16).sin()
    found = copy.FlatIPIndex(rows).search(rows[:3], 4)
    assert type(found) is copy.TopK
    for ours, theirs in zip(valm_kernels.ip_topk(rows[:3], rows, 4), found, strict=True):
        assert torch.equal(ours, theirs)


def test_operators_of_a_copy_are_its_own(copy, inputs):
    for module in ("visual_fusion.op", "topk.op"):  # which define them, when first called
        importlib.import_module(f"{copy.__name__}.{module}")
    from_copy = importlib.import_module(f"{copy.__name__}._ops").ops
    assert from_copy.name == COPIES[copy.__name__]
    assert from_copy.visual_fusion_attn is not torch.ops.valm_kernels.visual_fusion_attn
    torch.library.opcheck(from_copy.visual_fusion_attn.default, op_arguments(inputs))
    rows = torch.arange(50 * 16).reshape(50, 16).sin()
    torch.library.opcheck(from_copy.ip_topk, (rows[:3], rows, None, 4))


def test_one_graph_holds_the_operators_of_two_copies(copy, inputs):
    targets = []

    def both(q: torch.Tensor) -> torch.Tensor:
        with_q = {**inputs, "q": q}
        return valm_kernels.visual_fusion_attn(**with_q).sin() + copy.visual_fusion_attn(**with_q)

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    q = inputs["q"]
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend=keep)(q), both(q))
    namespaces = {target.partition(".")[0] for target in targets if "visual_fusion_attn" in target}
    assert namespaces == {"valm_kernels", COPIES[copy.__name__]}
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(q).sum(), q)[0] for f in (compiled, both)))


def test_no_copy_calls_the_operators_of_another():
    wrong = [path for path in PACKAGE.rglob("*.py") if "torch.ops.valm_kernels" in path.read_text(encoding="utf-8")]
    assert not wrong
