"""VaLM's entry in `AutoModelForCausalLM`, which imports the model on first use."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from valm.config import ValmConfig


class DeferredVaLM:
    """Placeholder for `VaLMForCausalLM`, which replaces it when imported."""

    config_class = ValmConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from valm.model import VaLMForCausalLM

        return VaLMForCausalLM.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        from valm.model import VaLMForCausalLM

        return VaLMForCausalLM._from_config(*args, **kwargs)


AutoModelForCausalLM.register(ValmConfig, DeferredVaLM)
