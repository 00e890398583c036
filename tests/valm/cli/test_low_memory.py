"""With hardly any memory left (`ulimit -v`), a command ends with its result or one sentence: no traceback, no hang."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.valm.cli.commands import run
from tests.valm.killed import exit_code, forked, needs_fork
from tests.valm.stores import make_stores
from valm.clip.clip import Clip
from valm.retrieval.retriever import Retriever
from valm.training.image_trainer import check_resumable
from valm.training.launch import check_alone

resource = pytest.importorskip("resource")
COMMANDS = {
    "verify": ["verify", "kb"],
    "search": ["kb", "search", "kb", "a red apple", "-k", "2"],
    "build": ["kb", "build", "pictures", "--clip", "clip", "--out", "new"],
    "retrieve": ["retrieve", "corpus.txt", "--kb", "kb", "--out", "new", "-k", "2"],
}
# What the commands import: extension modules that are imported without memory crash.
IMPORTED = (torch, Clip, Retriever, check_alone, check_resumable)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    return make_stores(tmp_path_factory.mktemp("stores"))


@needs_fork
@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the size of the process from /proc")
@pytest.mark.parametrize("command", COMMANDS)
def test_result_or_sentence(stores, tmp_path, monkeypatch, command):
    shutil.copytree(stores, tmp_path / "stores")
    monkeypatch.chdir(tmp_path / "stores")
    seen = set()
    for megabytes in (0, 1, 2, 4, 8, 16, 32, 256):
        shutil.rmtree("new", ignore_errors=True)
        shown = tmp_path / f"{megabytes}.txt"

        def limited(megabytes=megabytes, shown=shown):
            with open(shown, "w") as file:
                os.dup2(file.fileno(), 2)
                sys.stderr = file
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + megabytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                status = run(*COMMANDS[command])
                file.flush()
                os._exit(status)

        status = exit_code(forked(limited))
        errors = shown.read_text()
        assert status in (0, 1) and "Traceback" not in errors, f"{megabytes} MB: status {status}, {errors[-2000:]}"
        assert status == 0 or errors.strip().splitlines()[-1].startswith("valm: error: "), errors[-2000:]
        seen.add(status)
    assert 0 in seen
