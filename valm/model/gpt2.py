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
    """The finder of a VaLM. Positions count from the first token that is not padding."""

    def put_on(self, part: Any) -> None:
        super().put_on(part)
        part.warn_if_padding_and_no_attention_mask = _says_nothing

    def place_text(self, decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """As in `ImageFinder`, and adds positions. Raises ValueError if a document is longer than the model's
        positions."""
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
                f"input_ids contains a document of at least {length} tokens, but this model has "
                f"{self.config.n_positions} positions: split the document"
            )


def _seen(cache: Any) -> int:
    """Number of tokens in the cache. The cache of continuous batching does not know it; positions are given there."""
    return 0 if cache is None else int(cache.get_seq_length())


def _says_nothing(ids: Tensor, mask: Tensor | None) -> None:
    """Replaces transformers' warning about padding without a mask. No token sees padding on the right; a mask for it
    would make transformers build a mask of all pairs of tokens. The check also synchronises with a GPU each step."""


class VaLMForCausalLM(AugmentedCausalLM, GPT2LMHeadModel):
    """VaLM with a language-model head and Hugging Face's interface: `from_pretrained`, `generate`, `Trainer`.

    It is an augmented GPT-2 whose config is a `ValmConfig`. Images come from the arguments `image_pool` and
    `image_index`, or from a retriever passed to `set_retriever`, which serves every forward pass and `generate()`.
    Without either, or with num_images = 0, the model is a GPT-2.

    A row is one document, or several if position_ids restart; tokens never see an earlier document. Positions count
    from the first token that is not padding. Padding may be on either side for training and scoring, on the left for
    `generate()`.

    Example:
        >>> config = valm.ValmConfig(vocab_size=100, n_layer=2, n_embd=32, n_head=4, image_dim=16, num_images=4)
        >>> model = valm.VaLMForCausalLM(config)
        >>> images = {"image_pool": torch.randn(5, 16), "image_index": torch.randint(5, (1, 3, 4))}
        >>> model(torch.tensor([[1, 2, 3]]), **images).logits.shape
        torch.Size([1, 3, 100])
    """

    config_class = ValmConfig
    config: ValmConfig
    finder_class = VaLMFinder
    wrapped_class = GPT2LMHeadModel

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers applies GPT-2's scaled initialisation. It skips that for classes outside its
        package, because their `_init_weights` may overwrite loaded weights; this class's does not."""
        return False


AutoModelForCausalLM.register(ValmConfig, VaLMForCausalLM, exist_ok=True)
# AutoTokenizer looks up the name in a saved tokenizer's configuration; otherwise it would load a plain fast tokenizer.
AutoTokenizer.register(ValmConfig, tokenizer_class=ClipBpeTokenizer, exist_ok=True)


def open_config(content: dict[str, Any], **kwargs: Any) -> Any:
    """`config_from_dict`; AutoModelForCausalLM then finds the model class."""
    found = config_from_dict(content, **kwargs)
    config = found[0] if isinstance(found, tuple) else found
    if not isinstance(config, ValmConfig):
        model = augmented_class(transformers_class(config.fusion["architecture"]), type(config).wrapped_class)
        AutoModelForCausalLM.register(type(config), model, exist_ok=True)
    return found
