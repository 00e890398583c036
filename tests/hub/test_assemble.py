"""valm_kernels as a kernel hub has it: without native code, loaded by path, beside the installed package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import valm_kernels
from hub.assemble import BACKENDS, LICENSE, NAME, VERSION, assemble

ROOT = Path(__file__).parents[2]
LOAD = """
import importlib.util, json, sys
from pathlib import Path

import torch


def load(backend):
    folder = Path(sys.argv[1], "build", f"torch-{backend}")
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    return kernel


torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
image_k, image_v = (torch.randn(2, 5, 16, requires_grad=True) for _ in range(2))
tensors = (q, k, v, image_k, image_v)
image_index = torch.randint(-1, 5, (1, 9, 2))


def attend(kernel, impl):
    out = kernel.visual_fusion_attn(*tensors, image_index=image_index, impl=impl)
    return (out, *torch.autograd.grad(out.square().sum(), tensors))
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    assemble(folder)
    return folder


def run(kernel: Path, code: str, before: str = "", **environment: str) -> str:
    """Runs LOAD and `code` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", before + LOAD + code, kernel],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_what_a_card_has_measured_comes_along(tmp_path, monkeypatch):
    package = tmp_path / "package"
    measured = ("visual_fusion/measured_crossover.json", "visual_fusion/triton/measured_tiles.json")
    for name in ("__init__.py", *measured):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("[]")
    monkeypatch.setattr("hub.assemble.PACKAGE", package)
    assemble(tmp_path / "hub")
    variant = tmp_path / "hub" / "build" / f"torch-{BACKENDS[0]}"
    noted = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
    assert all((variant / name).exists() and name in noted for name in measured)


@pytest.mark.slow  # it starts processes
def test_without_numpy_triton_and_native_code(kernel):
    code = """
kernel = load("cpu")
assert {name: getattr(kernel, name) for name in kernel.__all__}
rows = torch.randn(20, 16)
assert all(result.isfinite().all() for result in attend(kernel, "reference"))
assert torch.equal(kernel.ip_topk(rows, rows, 1, impl="reference").indices[:, 0], torch.arange(20))
for use in (lambda: attend(kernel, "auto"), lambda: kernel.ip_topk(rows, rows, 1), lambda: kernel.FlatIPIndex(rows)):
    try:
        use()
    except ImportError as error:
        print(error)
kernel.show_config()
assert not [name for name in sys.modules if name.split(".")[0] == "valm_kernels"]
"""
    printed = run(kernel, code, before="import sys; sys.modules['numpy'] = sys.modules['triton'] = None")
    refusal = "has no native code, because kernel hubs ship only Python. Choose impl='reference'"
    assert printed.count(refusal) == 4  # one of them by show_config


@pytest.mark.slow  # it starts processes
def test_two_versions_beside_the_installed_package(kernel):
    code = """
import valm_kernels
expected = attend(valm_kernels, "cpu")
for backend in ("cpu", "cuda"):
    for result, wanted in zip(attend(load(backend), "reference"), expected, strict=True):
        torch.testing.assert_close(result, wanted)
"""
    run(kernel, code)


@pytest.mark.slow  # it starts processes
def test_triton_kernels_under_the_interpreter(kernel):
    pytest.importorskip("triton", reason="Triton comes for Linux only")
    code = """
kernel = load("cuda")
for result, wanted in zip(attend(kernel, "triton"), attend(kernel, "reference"), strict=True):
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
ops = getattr(torch.ops, kernel.__name__)
inputs = (*tensors, None, image_index, *[None] * 8, True, 0.25, None, None, "triton", False)
torch.library.opcheck(ops.visual_fusion_attn.default, inputs)
fused = lambda q: kernel.visual_fusion_attn(q, *tensors[1:], image_index=image_index, impl="triton")
compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
for result, wanted in zip(*(torch.autograd.grad(f(q).sum(), q) for f in (compiled, fused)), strict=True):
    torch.testing.assert_close(result, wanted)
"""
    run(kernel, code, TRITON_INTERPRET="1")


def test_the_library_kernels_loads_it(kernel, tmp_path, monkeypatch):
    """By the example of docs/how-to/install.md. `make hub-kernel` installs the library: it is no dependency of valm."""
    pytest.importorskip("kernels", reason="needs the package kernels")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "hub-kernel").symlink_to(kernel)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "how-to" / "install.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(example, names)
    loaded, out = names["valm_kernels"], names["out"]
    assert loaded is not valm_kernels and set(loaded.__all__) == set(valm_kernels.__all__)
    inputs = [names[name] for name in ("q", "k", "v", "image_k", "image_v")]
    torch.testing.assert_close(out, valm_kernels.visual_fusion_attn(*inputs))


def test_kernels_reads_its_files(kernel):
    rust = pytest.importorskip("kernels._rust", reason="needs the package kernels")
    assert {str(backend) for backend in rust.Build.open(kernel).general.backends} == set(BACKENDS)
    ids = set()
    for backend in BACKENDS:
        folder = kernel / "build" / f"torch-{backend}"
        metadata = rust.Metadata.read_from_file(folder / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder))
        assert metadata.id.isidentifier()
        ids.add(metadata.id)
    assert len(ids) == len(BACKENDS)


def test_metadata_agree_with_build_toml(kernel):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    general = tomllib.loads((kernel / "build.toml").read_text())["general"]
    assert (general["name"], general["version"], general["license"]) == (NAME, VERSION, LICENSE)
    assert tuple(general["backends"]) == BACKENDS
    card = (kernel / "CARD.md").read_text()
    assert f'get_kernel("{general["hub"]["repo-id"]}", version={VERSION}' in card


@pytest.mark.slow  # it starts processes
def test_earlier_versions_of_kernels_find_it_in_a_folder_of_its_name(kernel):
    code = """
sys.path.insert(0, str(Path(sys.argv[1], "build", "torch-cpu")))
import valm_kernels
assert Path(valm_kernels.__file__).is_relative_to(sys.argv[1])
assert attend(valm_kernels, "reference")
"""
    run(kernel, code)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = subprocess.run([sys.executable, "-m", "hub.assemble", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{tmp_path} exists: remove it, or name a new folder\n"
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
