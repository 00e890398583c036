"""VaLM's entry in transformers' `AutoConfig`, and a check in all other config classes.

`valm.model.registration` imports this with the module of `AutoConfig`. The modules of configs and models import that
too, so they may be half imported then: ours are imported on first use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from valm.errors import ValmError
from valm.model.config_file import ADAPTER_FILE, MODEL_TYPE, NO_WEIGHTS


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


_config_dict = vars(PreTrainedConfig)["get_config_dict"].__func__


def _get_config_dict(
    cls: type[PreTrainedConfig], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> Any:
    """`PreTrainedConfig.get_config_dict`, which every config class reads its file by.

    Raises:
        ValmError: the file is that of a model with images, and the class that of another model: it would load without
            them. Configs of earlier versions have no `WEIGHTS_KEY`. Also for the folder of an adapter, which has no
            config.
    """
    found, unused = _config_dict(cls, pretrained_model_name_or_path, **kwargs)
    # AutoConfig asks with name_or_path, and AutoTokenizer, which needs no config, ignores its error and asks without
    wants_model = cls is not PreTrainedConfig or "name_or_path" in kwargs
    if not found and wants_model and os.path.isfile(Path(pretrained_model_name_or_path or "") / ADAPTER_FILE):
        raise ValmError(
            f"{pretrained_model_name_or_path} is an adapter, which transformers does not load: use valm.load, which "
            "finds its base model, or valm.load_adapter"
        )
    # AutoConfig asks by PreTrainedConfig itself
    if found.get("model_type") == MODEL_TYPE and cls is not PreTrainedConfig:
        options = found.get("fusion", found)
        if cls.model_type != MODEL_TYPE and isinstance(options, dict) and options.get("num_images") != 0:
            raise ValmError(
                f"{pretrained_model_name_or_path} cannot be loaded by a class of {cls.model_type}: {NO_WEIGHTS}"
            )
    return found, unused


PreTrainedConfig.get_config_dict = classmethod(_get_config_dict)  # type: ignore[method-assign, assignment]
AutoConfig.register(MODEL_TYPE, SavedConfig)
