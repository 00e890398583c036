"""VaLM: GPT-2 in which one layer also attends to the images retrieved for each token (Wang et al. 2022)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from valm.clip.tokenizer import ClipBpeTokenizer
from valm.model.augment import AugmentedCausalLM, augmented_class, transformers_class
from valm.model.config import ValmConfig, config_from_dict
from valm.model.documents import behind_gap, mask_of_tokens
from valm.model.image_finder import ImageFinder, cache_of

ONE_DOCUMENT = (
    "a row has {what} behind other text, and is read as one document: give position_ids that restart where another "
    "begins, with use_cache=False"
)


class VaLMFinder(ImageFinder):
    """That of a VaLM, whose positions count from the first token of a row, also behind padding."""

    _said_one_document = False

    def put_on(self, part: Any) -> None:
        super().put_on(part)
        part.warn_if_padding_and_no_attention_mask = _says_nothing

    def place_text(self, decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """As that of any model, with positions.

        Raises:
            ValueError: a document is longer than the model's positions; or the model is `strict`, and a row may have
                several documents.
        """
        mask, cache, positions = arguments.get("attention_mask"), cache_of(arguments), arguments.get("position_ids")
        tokens: Any = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        mask = mask.long() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        looks = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if positions is None and looks:
            self._say_that_rows_are_documents(tokens, mask, cache)
        if positions is None and mask is not None:
            positions = mask_of_tokens((mask.cumsum(1) - 1).clamp(min=0), cache, tokens.shape[1])
            arguments = arguments | {"position_ids": positions}
        if looks:
            self._check_length(_seen(cache) + tokens.shape[1] if positions is None else int(positions.max()) + 1)
        return super().place_text(decoder, arguments)

    def _say_that_rows_are_documents(self, tokens: Tensor, mask: Tensor | None, cache: Any) -> None:
        """Warns once if a row seems to have several documents.

        Raises:
            ValueError: it does, and the model is `strict`.
        """
        what, bos = None, self.config.bos_token_id
        if mask is not None and behind_gap(mask.bool()).any():
            what = "text behind padding"
        elif bos is not None and not tokens.is_floating_point():
            text = torch.ones_like(tokens) if mask is None else mask_of_tokens(mask, cache, tokens.shape[1])
            before = text.cumsum(1) - text + _seen(cache)
            again = (tokens == bos) & (text != 0) & (before > 0)
            if bos == self.config.eos_token_id:  # which may end the document, and pad behind it
                again = again[:, :-1] & (tokens[:, 1:] != bos)
            what = "a start token" if again.any() else None
        if what is None:
            return
        if self.strict:
            raise ValueError(ONE_DOCUMENT.format(what=what))
        if not self._said_one_document:
            self._said_one_document = True
            warnings.warn(ONE_DOCUMENT.format(what=what), stacklevel=6)

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
    _supports_flash_attn = False  # of which the fusion layer cannot read the masks
    _supports_flex_attn = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers skips GPT-2's scaled initialisation in classes outside its own package, as their
        `_init_weights` may overwrite loaded weights. This one does not."""
        return False

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as in transformers' own models
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        image_scores: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        image_slots: Tensor | None = None,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, P + T), 0 at padding, with P the tokens already in the cache. None = no padding.
            image_pool: (U, E) float, the image vectors of this batch, each once.
            image_index: (B, T, K) int32 or int64 rows of the pool, -1 = no image.
            image_scores: (B, T, K) float, the retrieval score of each image; of a model with score_scale only, which
                needs it beside images.
            position_ids: (B, T) int64; by default the distance from the row's first token. Where given ones restart in
                a row, another document begins.
            cache: returned by an earlier call with use_cache=True, or an empty one; this call adds to it.
            labels: (B, T) int64, input_ids with -100 at ignored positions; shifted inside.
            use_cache: return the cache too.
            logits_to_keep: return only the logits of the last positions, as many as this; 0 = all.
            inputs_embeds: (B, T, C), instead of input_ids. A retriever cannot be used then.
            image_slots: `valm_kernels.sort_image_slots(image_index, U)` beside images; checked on CPU, and not used
                on CUDA today.
            arguments: others of GPT2LMHeadModel, such as output_hidden_states.

        Raises:
            ValueError: a shape or value does not fit the model (the message says which), or output_attentions is set:
                it has no place for the weights of images.
        """
        images = {
            "image_pool": image_pool,
            "image_index": image_index,
            "image_scores": image_scores,
            "image_slots": image_slots,
        }
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            inputs_embeds=inputs_embeds,
            **{name: image for name, image in images.items() if image is not None},
            **arguments,
        )


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
