"""Undocumented names of transformers that valm uses, which a release may change without notice.

If a name is gone, the error says so. Otherwise `augment` would reject every family with a wrong reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import transformers
from torch import Tensor
from transformers import AttentionInterface

from valm.errors import ValmError

# Methods that valm overrides. If one were renamed, transformers would silently stop calling valm's.
OVERRIDDEN = ("_upload_modified_files", "is_custom_code", "warn_if_padding_and_no_attention_mask")


def gone(name: str) -> ValmError:
    """The error for a name that this transformers lacks."""
    return ValmError(
        f"transformers {transformers.__version__} has no {name}, which valm needs: install the oldest transformers "
        "that valm allows, or a newer valm"
    )


def _found(owner: Any, name: str) -> Any:
    try:
        return getattr(import_module(owner) if isinstance(owner, str) else owner, name)
    except (AttributeError, ImportError):
        of = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
        raise gone(f"{of}.{name}") from None


def check_overridden() -> None:
    """Raises ValmError if transformers lacks a method that valm overrides."""
    for name in OVERRIDDEN:
        _found(transformers.PreTrainedModel, name)


def attention_of(config: Any) -> str:
    """The name of the attention implementation in a config."""
    return _found(config, "_attn_implementation")


def with_attention(config: Any, name: str) -> Any:
    """A copy of the config of a module, with another attention implementation. The public setter would also change the
    nested configs, which the copy shares."""
    changed = copy.copy(config)
    changed._attn_implementation_internal = name
    if attention_of(changed) != name:
        raise gone(f"{type(config).__name__}._attn_implementation_internal")
    return changed


def own_attention(attention: Any, config: Any) -> Callable[..., Any] | None:
    """The function of transformers' attention interface that an attention with this config calls by itself. None for
    "eager" if the module of its class does not define the function."""
    eager = getattr(import_module(type(attention).__module__), "eager_attention_forward", None)
    return AttentionInterface().get(attention_of(config), eager)


def uses_interface(cls: type) -> bool:
    """Whether the forward of an attention class calls transformers' attention interface."""
    _found("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
    forward = getattr(cls, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if forward is not None else None
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def has_own_adapters(model: Any) -> bool:
    """Whether a model contains transformers' own adapters (`add_adapter`)."""
    return _found(model, "_hf_peft_config_loaded")


def offloaded_weight(model: Any, name: str) -> Tensor:
    """Loads a weight that accelerate has offloaded."""
    return _found("transformers.integrations.accelerate", "load_offloaded_parameter")(model, name)


def dequantized(weight: Any, module: Any) -> Tensor:
    """The values of a weight of `module` that bitsandbytes has quantised."""
    return _found("transformers.integrations.bitsandbytes", "dequantize_bnb_weight")(
        weight, getattr(module, "state", None)
    )
