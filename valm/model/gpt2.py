"""VaLM: GPT-2 in which one layer also attends to the images retrieved for each token (Wang et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from valm.clip.tokenizer import ClipBpeTokenizer
from valm.model.augment import AugmentedCausalLM, augmented_class, transformers_class
from valm.model.config import ValmConfig, config_from_dict
from valm.model.documents import mask_of_tokens
from valm.model.image_finder import ImageFinder
from valm.model.positions import cache_of


class VaLMFinder(ImageFinder):
    """That of a VaLM, whose positions count from the first token of a row, also behind padding."""

    def put_on(self, part: Any) -> None:
        super().put_on(part)
        part.warn_if_padding_and_no_attention_mask = _says_nothing

    def place_text(self, decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """As that of any model, with positions.

        Raises:
            ValueError: a document is longer than the model's positions.
        """
        mask, cache, positions = arguments.get("attention_mask"), cache_of(arguments), arguments.get("position_ids")
        tokens: Any = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        mask = mask.long() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        looks = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if positions is None and mask is not None:
            positions = mask_of_tokens((mask.cumsum(1) - 1).clamp(min=0), cache, tokens.shape[1])
            arguments = arguments | {"position_ids": positions}
        if looks:
            self._check_length(_seen(cache) + tokens.shape[1] if positions is None else int(positions.max()) + 1)
        return super().place_text(decoder, arguments)

    def _check_length(self, length: int) -> None:
        if length > self.config.n_positions:
            raise ValueError(
                f"input_ids has a document of at least {length} tokens, but this model has {self.config.n_positions} "
                "positions; split it"
            )


def _seen(cache: Any) -> int:
    """How many tokens are in the cache, which that of continuous batching cannot say: positions are given there."""
    return 0 if cache is None else int(cache.get_seq_length())


def _says_nothing(ids: Tensor, mask: Tensor | None) -> None:
    """In the place of what warns of padding without a mask: no token sees that on the right, and with a mask for it
    transformers would make one of all pairs of tokens. It would also wait for a GPU in every step."""


class VaLMForCausalLM(AugmentedCausalLM, GPT2LMHeadModel):
    """VaLM with a language-model head, with Hugging Face's interface: `from_pretrained`, `generate`, `Trainer`.

    It is what `valm.augment` makes of a GPT-2 with a config of its own (`ValmConfig`). A row is one document, or
    several where position_ids restart: no layer lets a token see an earlier document. Positions count from the first
    token behind padding. Padding may be on either side for training and scoring, on the left for `generate()`.

    Images come in one of two ways: as `image_pool` and `image_index`, or from a retriever passed to
    `set_retriever`, which then serves every forward pass and `generate()` token by token. Without either, or
    with num_images = 0, the model is a GPT-2.
    """

    config_class = ValmConfig
    config: ValmConfig
    finder_class = VaLMFinder
    wrapped_class = GPT2LMHeadModel

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers skips GPT-2's scaled initialisation in classes outside its own package, as their
        `_init_weights` may overwrite loaded weights. This one does not."""
        return False


AutoModelForCausalLM.register(ValmConfig, VaLMForCausalLM, exist_ok=True)
# AutoTokenizer looks up the name in a saved tokenizer's configuration; otherwise it would load a plain fast tokenizer.
AutoTokenizer.register(ValmConfig, tokenizer_class=ClipBpeTokenizer, exist_ok=True)


def open_config(content: dict[str, Any], **kwargs: Any) -> Any:
    """`config_from_dict`, whose model AutoModelForCausalLM finds then."""
    found = config_from_dict(content, **kwargs)
    config = found[0] if isinstance(found, tuple) else found
    if not isinstance(config, ValmConfig):
        model = augmented_class(transformers_class(config.fusion["architecture"]), type(config).wrapped_class)
        AutoModelForCausalLM.register(type(config), model, exist_ok=True)
    return found
