"""`import valm` is enough for transformers' Auto classes; each in a process of its own, as both are imported once."""

import subprocess
import sys

import pytest

CONFIG = "valm.ValmConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2)"


@pytest.mark.slow  # two processes that import torch
@pytest.mark.parametrize("first", ["import valm", "from transformers import AutoModelForCausalLM; import valm"])
def test_importing_valm_registers_with_the_auto_classes(first):
    code = (
        f"{first}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "assert AutoConfig.for_model('valm').fusion['image_dim'] == 768\n"
        f"assert type(AutoModelForCausalLM.from_config({CONFIG})) is valm.VaLMForCausalLM\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_valm_imports_no_torch():
    code = "import sys, valm, valm.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
