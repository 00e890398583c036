"""VaLM: GPT-2 in which one layer also attends to the images retrieved for each token (Wang et al. 2022)."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2LMHeadModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from valm.clip.tokenizer import ClipBpeTokenizer
from valm.errors import ValmError
from valm.model.attention import FusionOptions, TextLimits
from valm.model.augment import AugmentedCausalLM
from valm.model.config import ValmConfig
from valm.model.documents import (
    Documents,
    behind_gap,
    check_bounds,
    find_documents,
    restarts,
    text_mask,
    unless_all_zero,
)
from valm.model.image_model import ImageOptions, RetrievalCache, with_retrieval


class VaLMForCausalLM(AugmentedCausalLM, GPT2LMHeadModel):
    """VaLM with a language-model head, with Hugging Face's interface: `from_pretrained`, `generate`, `Trainer`.

    It is what `valm.augment` makes of a GPT-2, with documents: one begins at every `bos_token_id` (SOT), after padding,
    and where given position_ids restart. Positions restart there, and no layer lets a token see an earlier document.
    Padding may be on either side for training and scoring, on the left for `generate()`.

    Images come in one of two ways: as `image_pool` and `image_index`, or from a retriever passed to
    `set_retriever`, which then serves every forward pass and `generate()` token by token. Without either, or
    with num_images = 0, the model is a GPT-2.
    """

    config_class = ValmConfig
    config: ValmConfig
    forward_names = tuple(inspect.signature(GPT2LMHeadModel.forward).parameters)[1:]
    _supports_flash_attn = False  # its layers take a mask of documents, which these do not
    _supports_flex_attn = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers skips GPT-2's scaled initialisation in classes outside its own package, as their
        `_init_weights` may overwrite loaded weights. This one does not."""
        return False

    def __init__(self, config: ValmConfig):
        super().__init__(config)
        if config.fusion_scale == "embed_dim":
            block: Any = self.transformer.h[config.fusion_index]
            block.attn.scaling = config.n_embd**-0.5

    @property
    def fusion_options(self) -> FusionOptions:
        config = self.config
        head_dim = config.n_embd // config.n_head
        return FusionOptions(
            architecture="GPT2LMHeadModel",
            image_dim=config.image_dim,
            num_images=config.num_images,
            layer=config.fusion_layer,
            width=config.n_embd,
            heads=config.n_head,
            kv_heads=config.n_head,
            key_dim=head_dim,
            value_dim=head_dim,
            logit_bias=config.image_logit_bias_init,
            blind=config.blind,
            unfreeze="all",
            score_scale=config.image_score_scale_init,
            min_score=config.min_score,
            norm_eps=config.layer_norm_epsilon,
            sketch={},  # an adapter has one; with unfreeze="all" there is none
        )

    @property
    def image_options(self) -> ImageOptions:
        config = self.config
        scored = config.image_score_scale_init is not None
        return ImageOptions(config.num_images, config.image_dim, config.blind, scored, config.min_score)

    def keep_min_score(self, value: float | None) -> None:
        self.config.min_score = value

    def keep_num_images(self, value: int) -> None:
        self.config.num_images = value

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
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, P + T), 0 at padding, with P the tokens already in the cache. None = no padding.
            image_pool: (U, E) float, the image vectors of this batch, each once.
            image_index: (B, T, K) int32 or int64 rows of the pool, -1 = no image.
            image_scores: (B, T, K) float, the retrieval score of each image; of a model with image_score_scale_init
                only, which needs it beside images.
            position_ids: (B, T) int64; by default the distance from the document's first token. Where given ones
                restart in a row, another document begins.
            cache: returned by an earlier call with use_cache=True, or an empty one; this call adds to it.
            labels: (B, T) int64, input_ids with -100 at ignored positions; shifted inside.
            use_cache: return the cache too.
            logits_to_keep: return only the logits of the last positions, as many as this; 0 = all.
            inputs_embeds: (B, T, C), instead of input_ids. A document then begins after padding only, and a retriever
                cannot be used.
            image_slots: `valm_kernels.sort_image_slots(image_index, U)` beside images, so that the backward on CUDA
                need not sort.
            cu_seqlens: (N + 1,) int32, where the documents of input_ids begin, with its rows one behind the other, and
                B T; padding, on the right only, is of the document before it. For whole rows without a cache. A model
                on a GPU needs no mask where each row is one document, and cannot look whether that is so. On CPU
                wrong ones raise, on CUDA they are undefined behaviour.
            max_seqlen: the longest of these documents has at most as many tokens.
            arguments: others of GPT2LMHeadModel, such as output_hidden_states.

        Raises:
            ValueError: a shape or value does not fit the model (the message says which), or output_attentions is set:
                it has no place for the weights of images.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_pool=image_pool,
            image_index=image_index,
            image_scores=image_scores,
            position_ids=position_ids,
            cache=cache,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            inputs_embeds=inputs_embeds,
            image_slots=image_slots,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            **arguments,
        )

    def place_text(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward pass with the masks and positions of its documents.

        Raises:
            ValueError: a shape does not fit, a document is longer than the model's positions, or position_ids restart
                where there is a cache.
            TypeError: the cache has tokens of which it does not know where their documents begin.
        """
        cu_seqlens, max_seqlen = arguments.pop("cu_seqlens", None), arguments.pop("max_seqlen", None)
        if "text_limits" in arguments:  # of `generate` with a static cache
            return arguments
        ids: Any = arguments.get("input_ids")
        embeds: Any = arguments.get("inputs_embeds")
        mask = arguments.get("attention_mask")
        if (ids is None) == (embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = arguments.get("cache")
        if cache is None and arguments.get("use_cache"):
            cache = DynamicCache(config=self.config)
        kept, past = (None, 0) if cache is None else _with_documents(cache)
        tokens = ids if embeds is None else embeds
        given = arguments.get("position_ids")
        restart = None if given is None else self._restarts(given, tokens, mask, past)
        if restart is not None and kept is not None:
            if restart.any():
                raise ValueError(
                    "position_ids restart, so there are several documents in a row, which a cache cannot hold: call "
                    "with use_cache=False"
                )
            restart = None
        documents = self._documents(tokens, mask, past, None if kept is None else kept.first_keys.get(past), restart)
        positions = documents.position_ids if given is None else given
        self._check_positions(positions)
        length = tokens.shape[1]
        if kept is not None:
            # beside the present one, which is needed again if this pass fails
            known = {past: kept.first_keys[past]} if past > 0 else {}
            kept.first_keys = known | {past + length: documents.first_key[:, -1]}
        static = isinstance(cache, StaticCache)
        if cu_seqlens is not None:
            if cache is not None or embeds is not None:
                raise ValueError("cu_seqlens is of the documents in input_ids, without a cache: leave it out")
            check_bounds(cu_seqlens, max_seqlen, documents)
            first_key = None if cu_seqlens.shape[0] == len(tokens) + 1 else documents.first_key
        else:
            first_key = documents.first_key if static else unless_all_zero(documents.first_key)
        num_keys = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        limits = None
        if first_key is not None and cu_seqlens is not None:
            limits = TextLimits(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        elif first_key is not None:
            limits = TextLimits(first_key, first_key.new_full(first_key.shape[:1], past + length) if static else None)
        # where they are those of any text, GPT-2 counts them itself: in those of padding, transformers would see
        # documents, and make a mask
        counted = given is None and first_key is None and cache is None and length <= self.config.n_positions
        return arguments | {
            # not the ids, for which transformers would say that they have padding and no mask
            "input_ids": None,
            "inputs_embeds": self.transformer.wte(ids) if embeds is None else embeds,
            "attention_mask": self._blocks_mask(first_key, (length, num_keys), past),
            "position_ids": None if counted else positions,
            "cache": cache,
            "use_cache": cache is not None,
            "text_limits": limits,
        }

    def text_positions(self, arguments: dict[str, Any]) -> Tensor | None:
        """Those that are given, or restart behind padding; at each bos the retriever itself begins anew."""
        mask, given = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is None:
            return given
        begins = torch.zeros_like(mask, dtype=torch.bool)
        if given is not None:
            begins = restarts(given.expand_as(mask), mask).begins
        return find_documents(begins, nn.functional.pad(mask.bool(), (1, 0))).position_ids

    @torch.compiler.disable
    def _find_images(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Any, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        read = None if cache is None or attention_mask is None or attention_mask.dim() != 2 else attention_mask
        if read is not None and behind_gap(read.bool()).any():  # the retriever would read on
            raise ValueError(
                "there is padding inside a row, behind which another document begins: beside a cache and a retriever, "
                "give each document a row"
            )
        return super()._find_images(input_ids, attention_mask, cache, arguments)

    def place_in_static_cache(self, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
        placed = self.place_text(inputs | {"attention_mask": mask, "position_ids": None})
        return {name: placed[name] for name in ("attention_mask", "position_ids", "text_limits")}

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **arguments: Any
    ) -> Any:
        """`GenerationMixin.generate`; the retriever finds the images of each new token.

        Raises:
            ValueError: attention_mask has padding on the right, or there are position_ids or arguments that `forward`
                takes only.
        """
        if arguments.get("position_ids") is not None:  # which would be ignored
            raise ValueError("generate() counts the positions itself: leave position_ids out")
        mask = arguments.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask pads on the right; generate() continues the last column: pad on the left")
        return super().generate(inputs, generation_config, **arguments)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises: continuous batching has no place for where documents begin."""
        raise ValmError("a VaLM has no continuous batching (generate_batch): call generate()")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "text_limits" not in inputs:
            inputs.pop("position_ids", None)  # forward handles documents, generate() does not
        return inputs

    def _check_shapes(self, tokens: Tensor, mask: Tensor | None, past: int) -> None:
        """Checks ids (B, T) or embeddings (B, T, C) behind `past` tokens, and their mask (B, P + T)."""
        embedded = tokens.is_floating_point()
        if tokens.dim() != 2 + embedded or tokens.shape[1] == 0:
            name, shape = ("inputs_embeds", "(batch, tokens, n_embd)") if embedded else ("input_ids", "(batch, tokens)")
            raise ValueError(f"{name} must have shape {shape} with tokens, got {tuple(tokens.shape)}")
        batch, length = tokens.shape[:2]
        if mask is not None and mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask must have shape (batch, past + tokens) = {(batch, past + length)}, "
                f"got {tuple(mask.shape)}"
            )

    def _at_bos(self, tokens: Tensor) -> Tensor:
        """(B, T) bool: whether these ids (B, T) are bos; embeddings (B, T, C) are none."""
        if tokens.is_floating_point() or self.config.bos_token_id is None:
            return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens == self.config.bos_token_id

    def _documents(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        past: int,
        first_key: Tensor | None,
        restart: Tensor | None = None,
    ) -> Documents:
        """Of ids (B, T) or embeddings (B, T, C) behind `past` tokens, as in `find_documents`; mask (B, P + T). They
        begin where `restart` (B, T) says so too."""
        self._check_shapes(tokens, mask, past)
        begins = self._at_bos(tokens)
        if restart is not None:
            begins = begins | restart
        if mask is not None:
            mask = nn.functional.pad(mask.bool(), (1, 0))[:, past:]  # (B, 1 + T), from one column earlier
        return find_documents(begins, mask, past=past, first_key=first_key)

    def _restarts(self, position_ids: Tensor, tokens: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """(B, T) bool: where given position_ids say that another document begins, and no bos does."""
        self._check_shapes(tokens, mask, past)
        batch, length = tokens.shape[:2]
        if position_ids.dim() != 2 or position_ids.shape[1] != length or len(position_ids) not in (1, batch):
            raise ValueError(
                f"position_ids must have shape (batch, tokens) = {(batch, length)}, got {tuple(position_ids.shape)}"
            )
        text_before = None
        if past > 0:
            everywhere = tokens.new_ones(batch, dtype=torch.bool)
            text_before = everywhere if mask is None else mask[:, :past].bool().any(1)
        present = None if mask is None else mask[:, past:]
        return restarts(position_ids.expand(batch, -1), present, text_before).begins & ~self._at_bos(tokens)

    def _blocks_mask(self, first_key: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
        """`text_mask`, or None where a text block does the same without."""
        eager = self.config._attn_implementation == "eager"
        if first_key is None and not eager and (past == 0 or shape[0] == 1):
            return None
        return text_mask(first_key, shape, past, float_dtype=self.dtype if eager else None, device=self.device)

    def _check_positions(self, position_ids: Tensor) -> None:
        looked_up = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_up and int(position_ids.max()) >= self.config.n_positions:
            raise ValueError(
                f"input_ids has a document of at least {int(position_ids.max()) + 1} tokens, "
                f"but this model has {self.config.n_positions} positions; split it"
            )


def _with_documents(cache: Cache) -> tuple[RetrievalCache, int]:
    """`cache` itself, which knows where the document being read began, and the number of its tokens.

    Raises:
        TypeError: it is no cache of transformers, or has tokens, but a VaLM did not fill it.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, such as DynamicCache, got a {type(cache).__name__}")
    past = int(cache.get_seq_length())
    if past > 0 and past not in getattr(cache, "first_keys", {}):
        raise TypeError(
            f"where the documents of the {past} tokens in this {type(cache).__name__} begin is not known: begin with "
            "an empty one"
        )
    return with_retrieval(cache), past


AutoModelForCausalLM.register(ValmConfig, VaLMForCausalLM, exist_ok=True)
# AutoTokenizer looks up the name in a saved tokenizer's configuration; otherwise it would load a plain fast tokenizer.
AutoTokenizer.register(ValmConfig, tokenizer_class=ClipBpeTokenizer, exist_ok=True)
