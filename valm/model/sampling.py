"""How the commands choose the next token."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from valm.errors import ValmError
from valm_kernels.json_files import short

# What the commands keep of a model's generation_config: where texts begin and end.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")


def keep_ends_alone(model: Any) -> None:
    """Removes everything but KEPT from the model's generation_config, which `generate` uses for options that are not
    given. Other entries may change which token is the likeliest, end a text or change what `generate` returns. Raises
    ValmError if an entry of KEPT is no token id."""
    kept = {name: getattr(model.generation_config, name, None) for name in KEPT}
    for name, value in kept.items():
        if not all(id is None or isinstance(id, int) for id in (value if isinstance(value, list) else [value])):
            raise ValmError(
                f"the generation_config of {model.name_or_path} contains the {name} {short(value)}, expected a token "
                "id: correct it, or save the model again"
            )
    model.generation_config = GenerationConfig(**kept)


def sampling_options(sample: bool, temperature: float = 1.0, top_p: float = 1.0) -> dict[str, Any]:
    """Options of `generate` after `keep_ends_alone`: choose the likeliest token, or sample from the model's
    probabilities."""
    if not sample:
        return {"do_sample": False}
    # by default, transformers samples from only the 50 likeliest
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
