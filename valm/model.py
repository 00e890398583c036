"""VaLM: GPT-2 in which one block also attends to the images retrieved for each token (Wang et al. 2022)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg

from valm.config import ValmConfig
from valm.errors import ValmError
from valm.fusion import VisualFusionAttention, VisualFusionBlock
from valm.image_model import ImageModel, ImageOptions, RetrievalCache
from valm.retrieval.retriever import Retriever
from valm.self_query import QueryHead, queries_itself
from valm.tokenizer import ClipBpeTokenizer


class VaLMCache(RetrievalCache, DynamicCache):
    """State of the tokens read so far: keys and values, where each row's document began, and the retriever's state."""

    first_key: Tensor | None = None  # (B,) int32, the first key of the document being read

    def reorder_state(self, rows: Tensor) -> None:
        super().reorder_state(rows)
        if self.first_key is not None:
            self.first_key = self.first_key[rows.to(self.first_key.device)]


def valm_cache(cache: Any) -> VaLMCache | None:
    """`cache` itself; an empty `DynamicCache`, as `generate` makes one, becomes a `VaLMCache`."""
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        cache.__class__ = VaLMCache
        cache.layer_class_to_replicate = DynamicLayer  # the blocks of a query head are not in the config
    if cache is not None and not isinstance(cache, VaLMCache):
        got = f"a {type(cache).__name__}"
        if type(cache) is DynamicCache:
            got += f" with {cache.get_seq_length()} tokens: begin with an empty one"
        raise TypeError(f"cache must be a VaLMCache or an empty DynamicCache, got {got}")
    return cache


# image_pool, image_index and image_scores, as the blocks take them.
Images: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
# Finds them by the embeddings (B, T, C) of tokens, the mask of the text blocks, and the cache.
FindImages: TypeAlias = Callable[[Tensor, Tensor | None, Cache | None], Images]

# Weights of the fusion attention that GPT-2 lacks.
FUSION_PARAMETERS = (
    *("image_proj", "ln_img.weight", "ln_img.bias", "image_k_bias", "image_v_bias", "image_logit_bias"),
    "image_score_scale",
)


class VaLMPreTrainedModel(GPT2PreTrainedModel):
    config_class = ValmConfig
    config: ValmConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GPT2Block", "VisualFusionBlock"]  # noqa: RUF012 (no ClassVar in transformers)
    _supports_flash_attn = False  # text blocks take a mask of documents, which these do not
    _supports_flex_attn = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers skips GPT-2's scaled initialisation in classes outside its own package, as their
        `_init_weights` may overwrite loaded weights. This one does not."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisualFusionAttention) and self.config.num_images > 0:
            init.zeros_(module.image_k_bias)
            init.zeros_(module.image_v_bias)
            init.constant_(module.image_logit_bias, float(self.config.image_logit_bias_init))
            initial_scale = self.config.image_score_scale_init
            if module.image_score_scale is not None and initial_scale is not None:
                init.constant_(module.image_score_scale, float(initial_scale))
            if module.image_proj is not None:
                # from a generator of its own, so that with one seed GPT-2* and VaLM share the same initial weights
                generator = torch.Generator(module.image_proj.device).manual_seed(torch.initial_seed() + 1)
                init.normal_(module.image_proj, std=self.config.image_dim**-0.5, generator=generator)


class VaLMModel(VaLMPreTrainedModel):
    """The stack of blocks: from token ids and images to hidden states."""

    def __init__(self, config: ValmConfig):
        super().__init__(config)
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(
            (VisualFusionBlock if i == config.fusion_index else GPT2Block)(config, layer_idx=i)
            for i in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def forward(
        self,
        inputs_embeds: Tensor,  # (B, T, C)
        first_key: Tensor,  # (B, T)
        position_ids: Tensor,  # (B, T)
        image_pool: Tensor | None,  # (U, E)
        image_index: Tensor | None,  # (B, T, K)
        image_scores: Tensor | None,  # (B, T, K)
        cache: VaLMCache | None,
        find_images: FindImages | None = None,  # instead of given images
        image_slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # the input of each block and the output of the last LayerNorm, all (B, T, C)
        limits = self.unless_all_zero(first_key)
        mask = self.text_mask(inputs_embeds, limits, cache)
        hidden_states = inputs_embeds + self.wpe(position_ids)
        if find_images is not None:
            image_pool, image_index, image_scores = find_images(hidden_states, mask, cache)
        hidden_states = self.drop(hidden_states)
        inputs = []
        for block in self.h:
            inputs.append(hidden_states)
            if isinstance(block, VisualFusionBlock):
                images = (image_pool, image_index, image_scores)
                hidden_states = block(hidden_states, *images, limits, cache, image_slots)
            else:
                hidden_states = block(hidden_states, cache, attention_mask=mask, use_cache=cache is not None)
        return *inputs, self.ln_f(hidden_states)

    @staticmethod
    def unless_all_zero(first_key: Tensor) -> Tensor | None:
        """None if every query sees everything before it, which is faster. Checked on CPU only: elsewhere it would wait
        for the device, and a compiled graph cannot check."""
        if first_key.device.type == "cpu" and not torch.compiler.is_compiling() and not first_key.any():
            return None
        return first_key

    def text_mask(self, inputs_embeds: Tensor, first_key: Tensor | None, cache: Cache | None) -> Tensor | None:
        """The mask of the text blocks, (B, 1, T, S), or None for plain causal attention."""
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        eager = self.config._attn_implementation == "eager"
        if first_key is None and not eager and (past == 0 or length == 1):
            return None
        key = torch.arange(past + length, device=inputs_embeds.device)  # (S,)
        mask = (key <= key[past:, None])[None, None]  # (1, 1, T, S)
        if first_key is not None:
            mask = mask & (key >= first_key[:, None, :, None])  # (B, 1, T, S)
        if not eager:
            return mask
        return (
            torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(self.dtype).min).to(self.dtype)
        )


class VaLMForCausalLM(ImageModel, VaLMPreTrainedModel, GenerationMixin):
    """VaLM with a language-model head, with Hugging Face's interface: `from_pretrained`, `generate`, `Trainer`.

    A document begins at every `bos_token_id` (SOT) and after padding. Positions restart there, and no block lets a
    token see an earlier document. Padding may be on either side for training and scoring, on the left for
    `generate()`.

    Images come in one of two ways: as `image_pool` and `image_index`, or from a retriever passed to
    `set_retriever`, which then serves every forward pass and `generate()` token by token. Without either, or
    with num_images = 0, the model is a GPT-2.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (no ClassVar in transformers)

    def __init__(self, config: ValmConfig):
        super().__init__(config)
        self.transformer = VaLMModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.query_head: QueryHead | None = None
        if config.query_clip is not None:
            self.query_head = QueryHead(config)
        self.post_init()

    def add_query_head(self, clip: str) -> QueryHead:
        """Gives the model a new query head, with random weights, for the CLIP whose weights have SHA-256 `clip`.

        Raises:
            ValmError: the model retrieves no images.
        """
        config = self.config
        config.check_query_head()
        config.query_clip = clip
        self.query_head = QueryHead(config)
        return self.query_head.to(self.device, self.dtype)

    @property
    def image_options(self) -> ImageOptions:
        config = self.config
        scored = config.image_score_scale_init is not None
        return ImageOptions(config.num_images, config.image_dim, config.blind, scored)

    @classmethod
    def from_gpt2(
        cls, gpt2: GPT2LMHeadModel, *, image_logit_bias_init: float = -10.0, **arguments: Any
    ) -> "VaLMForCausalLM":
        """A VaLM that starts from a pretrained GPT-2: same weights, images switched off by a negative image_logit_bias.

        At -10 an image weighs e^-10 of a token with the same score: the logits equal GPT-2's to about four digits, and
        the gradient can still switch the images on. The other arguments are those of `ValmConfig`.

        Raises:
            ValmError: `gpt2` is a model of another kind, its sizes differ from the arguments, or there is no such
                argument.
        """
        ValmConfig.check_names(arguments)
        if not isinstance(gpt2, GPT2LMHeadModel):
            raise ValmError(
                f"from_gpt2 takes a GPT2LMHeadModel, got a {type(gpt2).__name__}: valm.augment lets other decoders "
                "see images"
            )
        config = gpt2.config.to_dict()
        for name in ("model_type", "architectures"):
            config.pop(name, None)
        config |= arguments | {"image_logit_bias_init": image_logit_bias_init}
        model = cls(ValmConfig(**config))
        model.to(dtype=gpt2.dtype)  # type: ignore[call-arg]  # transformers wraps `to` so that self is lost
        try:
            names = model.load_state_dict(gpt2.state_dict(), strict=False)
        except RuntimeError as error:  # sizes that differ
            raise ValmError(f"the GPT-2 does not fit these arguments: {str(error).splitlines()[-1].strip()}") from error
        own = {f"transformer.h.{model.config.fusion_index}.attn.{name}" for name in FUSION_PARAMETERS}
        wrong = sorted({*names.missing_keys, *names.unexpected_keys} - own)
        if wrong:
            raise ValmError(f"the GPT-2 does not fit these arguments: {wrong[0]} is in one of the two models only")
        return model

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
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
        image_slots: Tensor | None = None,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, P + T), 0 at padding, with P the tokens already in the cache. None = no padding.
            image_pool: (U, E) float, the image vectors of this batch, each once.
            image_index: (B, T, K) int32 or int64 rows of the pool, -1 = no image.
            image_scores: (B, T, K) float, the retrieval score of each image; of a model with image_score_scale_init
                only, which needs it beside images.
            position_ids: (B, T) int64; by default the distance from the document's first token.
            cache: returned by an earlier call with use_cache=True, or an empty DynamicCache; this call adds to it.
            labels: (B, T) int64, input_ids with -100 at ignored positions; shifted inside.
            use_cache: return the cache too.
            logits_to_keep: return only the logits of the last positions, as many as this; 0 = all.
            inputs_embeds: (B, T, C), instead of input_ids. A document then begins after padding only, and a retriever
                cannot be used.
            output_hidden_states: return the input of each block and the output of the last LayerNorm too.
            image_slots: `valm_kernels.sort_image_slots(image_index, U)` beside images, so that the backward on CUDA
                need not sort; image_index must be -1 at padding then.

        Raises:
            ValueError: a shape or value does not fit the model (the message says which), or output_attentions is set:
                it has no place for the weights of images.
        """
        config = self.config
        if output_attentions or (output_attentions is None and config.output_attentions):
            raise ValueError(
                "output_attentions: the fusion block has one softmax over text and images; call fusion_attention()"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        tokens = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        cache = VaLMCache() if use_cache and cache is None else valm_cache(cache)
        first_key, present = self._documents(tokens, attention_mask, cache)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + tokens.shape[1], device=tokens.device) - first_key
            if present is not None:
                position_ids = position_ids.masked_fill(~present, 0)
        self._check_positions(position_ids)
        if image_slots is not None and image_index is None:
            raise ValueError("image_slots must be given together with image_pool and image_index")
        find_images: FindImages | None = None
        if image_pool is None and image_index is None and image_scores is None:
            if queries_itself(self):
                find_images = partial(self._find_images_itself, present)
            else:
                image_pool, image_index, image_scores = self.find_images(input_ids, attention_mask, cache)
        image_pool, image_index = self._present_images(tokens, image_pool, image_index, image_scores, present)

        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        images = (image_pool, image_index, image_scores)
        hidden_states = self.transformer(
            inputs_embeds, first_key, position_ids, *images, cache, find_images, image_slots
        )
        if cache is not None:
            cache.first_key = first_key[:, -1]
        logits = self.lm_head(hidden_states[-1][:, -logits_to_keep:])  # (B, T, V); -0 keeps all
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **loss_arguments)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=cache, hidden_states=hidden_states if wanted else None
        )

    @torch.no_grad()
    def fusion_attention(
        self,
        input_ids: Tensor,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fusion block's joint attention weights: over text (B, H, T, T) and over images (B, H, T, K).

        Both together sum to 1 for every token. Arguments as in `forward`; without images the weights are those of the
        text alone. Unlike `forward` this materialises the weights: use it for plots and explanations of short texts.
        """
        stack, index = self.transformer, self.config.fusion_index
        first_key, present = self._documents(input_ids, attention_mask, None)
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) - first_key
        pool, rows = self._present_images(input_ids, image_pool, image_index, image_scores, present)
        # the images change nothing before the fusion block
        hidden_states = stack(stack.wte(input_ids), first_key, position_ids, None, None, None, None)
        block = cast(VisualFusionBlock, stack.h[index])
        return block.attn.weights(block.ln_1(hidden_states[index]), pool, rows, image_scores, first_key)

    def _check_positions(self, position_ids: Tensor) -> None:
        looked_up = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_up and int(position_ids.max()) >= self.config.n_positions:
            raise ValueError(
                f"input_ids has a document of at least {int(position_ids.max()) + 1} tokens, "
                f"but this model has {self.config.n_positions} positions; split it"
            )

    def self_queries(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The queries of the model's own head, (B, T, E) float32, zeros at padding. Only the head gets a gradient.

        Raises:
            ValmError: the model has no query head.
            ValueError: a wrong shape; arguments are as in `forward`.
        """
        stack = self.transformer
        first_key, present = self._documents(input_ids, attention_mask, None)
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) - first_key
        if present is not None:
            position_ids = position_ids.masked_fill(~present, 0)
        self._check_positions(position_ids)
        with torch.no_grad():
            embeddings = stack.wte(input_ids) + stack.wpe(position_ids)
        mask = stack.text_mask(embeddings, stack.unless_all_zero(first_key), None)
        return self._self_queries(present, embeddings, mask, None)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **arguments: Any
    ) -> Any:
        """`GenerationMixin.generate`; the retriever finds the images of each new token.

        Raises:
            ValueError: attention_mask has padding on the right.
        """
        mask = arguments.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask pads on the right; generate() continues the last column: pad on the left")
        return super().generate(inputs, generation_config, **arguments)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises: a VaLM reads its texts from a `VaLMCache`."""
        raise ValmError("a VaLM has no continuous batching (generate_batch): call generate()")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("position_ids", None)  # forward handles documents, generate() does not
        return inputs

    def _documents(
        self, tokens: Tensor, attention_mask: Tensor | None, cache: VaLMCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """For ids (B, T) or embeddings (B, T, C): first_key (B, T) int32, where each token's document begins, and which
        positions are not padding, (B, T) bool or None."""
        embedded = tokens.is_floating_point()
        if tokens.dim() != 2 + embedded or tokens.shape[1] == 0:
            name, shape = ("inputs_embeds", "(batch, tokens, n_embd)") if embedded else ("input_ids", "(batch, tokens)")
            raise ValueError(f"{name} must have shape {shape} with tokens, got {tuple(tokens.shape)}")
        batch, length = tokens.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if embedded or self.config.bos_token_id is None:
            begins = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
        else:
            begins = tokens == self.config.bos_token_id  # (B, T)
        present = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + length):
                raise ValueError(
                    f"attention_mask must have shape (batch, past + tokens) = {(batch, past + length)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            padded = nn.functional.pad(attention_mask.bool(), (1, 0))[:, past:]  # (B, 1 + T), from one column earlier
            present = padded[:, 1:]
            begins = present & (begins | ~padded[:, :-1])
        index = torch.arange(past, past + length, dtype=torch.int32, device=tokens.device)
        start = torch.zeros(batch, dtype=torch.int32, device=tokens.device)
        if past > 0 and cache is not None and cache.first_key is not None:
            start = cache.first_key
        first_key = torch.where(begins, index, start[:, None]).cummax(dim=1).values
        return first_key, present

    def _self_queries(
        self, present: Tensor | None, embeddings: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        if self.query_head is None:
            raise ValmError('query="self" needs a query head: train one with `valm distill`')
        queries = self.query_head(embeddings, mask, cache)
        return queries if present is None else queries.masked_fill(~present[..., None], 0)

    @torch.compiler.disable
    @torch.no_grad()
    def _find_images_itself(
        self, present: Tensor | None, embeddings: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Images:
        """The images nearest to the queries of the model's own head (`FindImages`).

        Raises:
            ValueError: the head has not read what the cache holds, or the retriever was replaced in a compiled model.
        """
        if not queries_itself(self):
            raise ValueError("a model was compiled with its own queries and then got another retriever: compile again")
        layers = self.config.n_layer
        if cache is not None and cache.get_seq_length(layers) != cache.get_seq_length():
            raise ValueError(
                "the cache was filled with images that were given, so the model's query head has not read the text "
                "before these tokens: begin with an empty cache"
            )
        found = cast(Retriever, self.retriever).retrieve(self._self_queries(present, embeddings, mask, cache))
        scores = found.scores if self.image_options.scored else None
        return *self._present_images(embeddings, found.image_pool, found.image_index, scores, present), scores

    def _present_images(
        self,
        tokens: Tensor,
        pool: Tensor | None,
        index: Tensor | None,
        scores: Tensor | None,
        present: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The images as the blocks take them: without those at padding; None if there are none."""
        self.check_images(tokens.shape[:2], pool, index, scores)
        if pool is None or index is None:
            return None, None
        if pool.shape[0] == 0:
            return None, None
        if present is not None:
            index = index.masked_fill(~present[..., None], -1)
        return pool, index


AutoModelForCausalLM.register(ValmConfig, VaLMForCausalLM, exist_ok=True)
# AutoTokenizer looks up the name in a saved tokenizer's configuration; otherwise it would load a plain fast tokenizer.
AutoTokenizer.register(ValmConfig, tokenizer_class=ClipBpeTokenizer, exist_ok=True)
