"""VaLM's entry in transformers' `AutoConfig`.

`valm.model.registration` imports this with the module of `AutoConfig`. The modules of configs and models import that
too, so they may be half imported then: ours are imported on first use.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from valm.model.config_file import MODEL_TYPE


class SavedConfig(PreTrainedConfig):
    """The config in a file of model_type "valm": a `ValmConfig`, or that of an augmented decoder (`valm.augment`)."""

    model_type = MODEL_TYPE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from valm.model.gpt2 import VaLMForCausalLM

        return VaLMForCausalLM.config_class(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "base_config" in config_dict:
            from valm.model.augment import config_from_dict

            return config_from_dict(config_dict, **kwargs)
        from valm.model.gpt2 import VaLMForCausalLM

        return VaLMForCausalLM.config_class.from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, SavedConfig)
