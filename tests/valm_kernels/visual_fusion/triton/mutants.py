"""Copies of the kernels in which one line is changed: checks that have to notice the change run them."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.valm_kernels.visual_fusion.problems import Problem
from valm_kernels.visual_fusion import op
from valm_kernels.visual_fusion.triton import forward


class Mutant(NamedTuple):
    text: str  # in one file of the kernels
    replacement: str
    problem: Problem  # where it makes a difference


def mutant(text: str, replacement: str, **options: object) -> Mutant:
    return Mutant(text, replacement, replace(Problem(batch=1, num_queries=20, num_images=2), **options))


@contextmanager
def kernels_of(mutant: Mutant, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[dict[str, ModuleType]]:
    """Inside, visual_fusion_attn runs the copy, which lies in `folder`; yields its modules."""
    package = "mutant_kernels"
    copy = folder / package
    shutil.copytree(Path(forward.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    sources = {path: path.read_text() for path in copy.glob("*.py")}
    found = sum(mutant.text in code for code in sources.values())
    assert found == 1, f"the kernels have changed: {mutant.text!r} is in {found} files"
    for path, code in sources.items():
        # what it imports from folders above is the package's own
        code = re.sub(r"^from \.\.\.(?=\w)", "from valm_kernels.", code, flags=re.MULTILINE)
        code = re.sub(r"^from \.\.(?=[ \w])", "from valm_kernels.visual_fusion.", code, flags=re.MULTILINE)
        code = code.replace("visual_fusion. import", "visual_fusion import")
        path.write_text(code.replace(mutant.text, mutant.replacement))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    modules = {name: importlib.import_module(f"{package}.{name}") for name in ("launch", "forward", "backward")}
    monkeypatch.setattr(op, "_implementation", lambda _: (modules["forward"].forward, modules["backward"].backward))
    try:
        yield modules
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            del sys.modules[name]
