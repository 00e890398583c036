"""Tries an installed valm without pytest and without the source tree: `python -I tests/smoke.py`.

`make sdist-check` and cibuildwheel run it on what they have installed. With -I the folder of this file is not
importable.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import valm
import valm_kernels
from valm_kernels.native import native

# Both packages and the native module come from this environment, not from a source tree.
for module in (valm, valm_kernels, native()):
    assert Path(module.__file__).is_relative_to(sys.prefix), f"{module.__name__} comes from {module.__file__}"
assert valm.__version__ == valm_kernels.__version__
shown = valm_kernels.show_config()
assert f"{valm_kernels.__version__}\n" in shown
if sys.platform == "linux":  # torch's, which the native module shares
    assert shown.splitlines()[-1].count("libgomp") == 1, shown

generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 4, 33, 64, generator=generator, requires_grad=True) for _ in range(3))
image_k, image_v = (torch.randn(4, 10, 64, generator=generator, requires_grad=True) for _ in range(2))
image_index = torch.randint(-1, 10, (2, 33, 4), generator=generator)
inputs = (q, k, v, image_k, image_v)
results = {}
for impl in ("cpu", "reference"):
    out = valm_kernels.visual_fusion_attn(*inputs, image_index=image_index, impl=impl)
    results[impl] = (out, *torch.autograd.grad(out.square().sum(), inputs))
torch.testing.assert_close(results["cpu"], results["reference"])

database, queries = (torch.randn(rows, 96, generator=generator) for rows in (1000, 5))
scores, rows = valm_kernels.FlatIPIndex(database, dtype="float32").search(queries, k=8)
expected = (queries.double() @ database.double().T).topk(8)
torch.testing.assert_close(scores, expected.values.float())
assert torch.equal(rows, expected.indices)

valm_command = Path(sysconfig.get_path("scripts")) / "valm"
shown = subprocess.run([valm_command, "--help"], capture_output=True, text=True, check=True).stdout
assert shown.startswith("usage: valm"), shown
print("smoke test passed")
