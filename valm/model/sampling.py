"""How the commands choose the next token."""

from __future__ import annotations

from typing import Any

# A base's generation_config may have other values, which would change which token is the likeliest.
UNCHANGED: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def sampling_options(sample: bool, temperature: float = 1.0, top_p: float = 1.0) -> dict[str, Any]:
    """Options of transformers' `generate`: the likeliest token each time, or one drawn from the model's own
    probabilities, whatever the generation_config of the model says. Of that only the tokens that end a text count.
    """
    if not sample:
        return UNCHANGED | {"do_sample": False}
    # transformers would otherwise draw from the 50 likeliest alone
    return UNCHANGED | {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
