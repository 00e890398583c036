"""Every function and class on the pages of the reference has an example in its docstring, and the examples run."""

import doctest
import inspect
import pkgutil
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import valm
import valm_kernels
from tests.valm.models import llama_of, model_for
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
NAMES = [
    name
    for page in ("valm", "valm_kernels")
    for name in re.findall(r"^::: (\S+)", (REFERENCE / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
]
IMPORTED = {"np": np, "torch": torch, "valm": valm, "valm_kernels": valm_kernels}
CAPTIONS = {"red": "a red apple", "green": "the green grass", "blue": "the blue sky"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What examples name: pictures, clip, kb, model, base and corpus.txt."""
    root = tmp_path_factory.mktemp("examples")
    (root / "pictures").mkdir()
    for color, caption in CAPTIONS.items():
        Image.new("RGB", (32, 32), color).save(root / "pictures" / f"{color}.png")
        (root / "pictures" / f"{color}.txt").write_text(caption)
    (root / "corpus.txt").write_text("\n".join([*CAPTIONS.values(), *TEXTS]))
    make_clip(prune_tokenizer(clip_tokenizer(), TEXTS)).save(root / "clip")
    clip = valm.Clip.load(root / "clip")
    kb = build(FolderSource(root / "pictures"), root / "kb", clip, progress=False)
    retriever = valm.Retriever(valm.ContextEncoder(clip), kb, k=2)
    model = model_for(retriever)
    model.set_retriever(retriever)
    valm.save_checkpoint(model, clip.tokenizer, root / "model")
    tokenizer = gpt2_like(TEXTS)
    llama_of(tokenizer).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    return root


def docstrings(name: str) -> Iterator[tuple[str, str]]:
    """The docstrings of a function, or of a class and its public members, each with its name."""
    found = pkgutil.resolve_name(name)
    yield name, inspect.getdoc(found) or ""
    for member in dir(found) if isinstance(found, type) else ():
        value: Any = inspect.getattr_static(found, member)
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if not member.startswith("_") and str(getattr(function, "__module__", "")).startswith("valm"):
            yield f"{name}.{member}", inspect.getdoc(function) or ""


def examples(name: str) -> list[doctest.DocTest]:
    parser = doctest.DocTestParser()
    return [parser.get_doctest(text, dict(IMPORTED), each, None, 0) for each, text in docstrings(name) if ">>>" in text]


def failures(test: doctest.DocTest) -> str:
    """What an example printed instead of what it says; empty if there is no difference."""
    torch.manual_seed(0)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    return "".join(said)


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest(">>> torch.arange(3).sum()\ntensor(4)\n", dict(IMPORTED), "x", None, 0)
    assert "Expected:\n    tensor(4)\nGot:\n    tensor(3)" in failures(test)


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, folder, tmp_path, monkeypatch):
    found = examples(name)
    run = [one for test in found for one in test.examples if not one.options.get(doctest.SKIP)]
    assert run, f"the docstring of {name} has no example that runs"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for test in found:
        assert failures(test) == "", test.name
