"""mypy knows the types of both packages: it reports the wrong calls below, each where it stands, and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CALLS = '''
import numpy as np
import torch
from torch import Tensor

from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import ContextCache
from valm.retrieval.ray_index import ShardedIndex
from valm.retrieval.retriever import BlindRetriever, Retrieved, Retriever
from valm_kernels import FlatIPIndex, ip_topk, visual_fusion_attn, visual_fusion_attn_varlen


class Once:
    """It finds images for a whole batch, but not token by token."""

    k, dim = 4, 8

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Retrieved:
        raise NotImplementedError


class TokenByToken(Once):
    def start(self, batch: int) -> ContextCache:
        raise NotImplementedError

    def step(self, input_ids: Tensor, state: ContextCache, attention_mask: Tensor | None = None) -> Retrieved:
        raise NotImplementedError


def attend(x: Tensor) -> None:
    visual_fusion_attn(x, x, x, None, None).transpose(1, 2)
    visual_fusion_attn(x, x, x, None, None, image_q=x, softcap=30.0, return_lse=True)[1].exp()
    out, weights = visual_fusion_attn(x, x, x, x, x, return_image_weights=True)
    out.add(weights)
    visual_fusion_attn(q="x", k=x, v=x, image_k=None, image_v=None)  # call-overload
    visual_fusion_attn(x, x, x, None, None, softcap="30")  # call-overload
    visual_fusion_attn(x, x, x, None, None, return_lse=True).transpose(1, 2)  # attr-defined
    visual_fusion_attn_varlen(x, x, x, None, None, x, scale=1.0).add(1)
    visual_fusion_attn_varlen(x, x, x, None, None, x, scale="1")  # call-overload


def retrieve(model: VaLMForCausalLM, found: Retriever, blind: BlindRetriever) -> None:
    for retriever in (found, blind):
        model.set_retriever(retriever)
    model.set_retriever(TokenByToken())
    model.set_retriever(Once())  # arg-type


def search(found: Retriever, exact: FlatIPIndex, sharded: ShardedIndex) -> None:
    Retriever(found.encoder, found.kb, 4, exact)
    Retriever(found.encoder, found.kb, 4, sharded)
    Retriever(found.encoder, found.kb, 4, found)  # arg-type
    ip_topk(torch.ones(2, 8), torch.ones(4, 8), 1).scores.softmax(-1)
    ip_topk(np.ones((2, 8)), torch.ones(4, 8), 1).scores.softmax(-1)  # attr-defined
'''


def mypy(file: Path, *options: str) -> list[tuple[int, str]]:
    """(line, error code) of every error in `file`."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *options, str(file)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    # by its name alone: for a file that has not changed, the cache repeats errors with the folder of an earlier run
    errors = re.findall(rf"^.*\b{re.escape(file.name)}:(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE)
    return [(int(line), code) for line, code in errors]


def test_wrong_calls_are_reported_and_right_ones_are_not(tmp_path):
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    expected = [(number, line.split("  # ")[1]) for number, line in enumerate(CALLS.splitlines(), 1) if "  # " in line]
    assert len(expected) == 7
    assert mypy(file) == expected


def test_a_missing_torch_or_transformers_is_an_error(tmp_path):
    file = tmp_path / "imports.py"
    file.write_text("import torch\nimport transformers\n")
    assert mypy(file) == []
    assert mypy(file, "--no-site-packages") == [(1, "import-not-found"), (2, "import-not-found")]
