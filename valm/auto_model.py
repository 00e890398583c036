"""VaLM's entry in `AutoModelForCausalLM`, which imports the model when one is made."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from valm.config import ValmConfig


class DeferredVaLM:
    """Stands for `VaLMForCausalLM` until that is imported and takes this place itself."""

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
