"""VaLM: GPT-2 in which one block also attends to the pictures retrieved for each token (Wang et al. 2022)."""

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from valm.config import ValmConfig
from valm.errors import ValmError
from valm.fusion import VisualFusionAttention, VisualFusionBlock
from valm.retrieval.context import ContextCache
from valm.retrieval.retriever import BlindRetriever, ImageRetriever


class VaLMCache(DynamicCache):
    """What has been read so far: keys and values, where each row's document began, and the retriever's state."""

    def __init__(self) -> None:
        super().__init__()
        self.first_key: Tensor | None = None  # (B,) int32, the first key of the document being read
        self.retrieval: ContextCache | None = None  # the retriever's state, moved along with the beams

    is_croppable = False

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the retriever's state cannot be taken back."""
        raise NotImplementedError("a VaLMCache cannot be cropped, so assisted decoding does not work with VaLM")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        super().reorder_cache(beam_idx)
        if self.first_key is not None:
            self.first_key = self.first_key[beam_idx.to(self.first_key.device)]
        if self.retrieval is not None:
            self.retrieval.reorder(beam_idx)


class VaLMPreTrainedModel(GPT2PreTrainedModel):
    config_class = ValmConfig
    config: ValmConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GPT2Block", "VisualFusionBlock"]  # noqa: RUF012 (no ClassVar in transformers)
    _supports_flash_attn = False  # text blocks take a mask of documents, which these do not
    _supports_flex_attn = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers leaves out GPT-2's scaled initialisation in classes outside its own package, as their
        `_init_weights` may overwrite loaded weights. This one does not."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisualFusionAttention) and self.config.num_images > 0:
            init.zeros_(module.image_k_bias)
            init.zeros_(module.image_v_bias)
            init.constant_(module.image_logit_bias, float(self.config.image_logit_bias_init))
            if module.image_proj is not None:
                # from numbers of its own, so that one seed gives GPT-2* and VaLM the same weights where both have any
                generator = torch.Generator(module.image_proj.device).manual_seed(torch.initial_seed() + 1)
                init.normal_(module.image_proj, std=self.config.image_dim**-0.5, generator=generator)


class VaLMModel(VaLMPreTrainedModel):
    """The stack of blocks: token ids and pictures in, hidden states out."""

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
        input_ids: Tensor,  # (B, T)
        first_key: Tensor,  # (B, T)
        position_ids: Tensor,  # (B, T)
        image_pool: Tensor | None,  # (U, E)
        image_index: Tensor | None,  # (B, T, K)
        cache: VaLMCache | None,
        num_blocks: int | None = None,
    ) -> Tensor:  # (B, T, C), before the last LayerNorm when num_blocks is given
        limits = self.unless_all_zero(first_key)
        mask = self._text_mask(input_ids, limits, cache)
        hidden_states = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        for block in self.h[:num_blocks]:
            if isinstance(block, VisualFusionBlock):
                hidden_states = block(hidden_states, image_pool, image_index, limits, cache)
            else:
                hidden_states = block(hidden_states, cache, attention_mask=mask, use_cache=cache is not None)
        return hidden_states if num_blocks is not None else self.ln_f(hidden_states)

    @staticmethod
    def unless_all_zero(first_key: Tensor) -> Tensor | None:
        """None where every query sees everything before it, which is faster. Looked up on CPU only: elsewhere
        the question would stop the device."""
        if first_key.device.type == "cpu" and not first_key.any():
            return None
        return first_key

    def _text_mask(self, input_ids: Tensor, first_key: Tensor | None, cache: Cache | None) -> Tensor | None:
        """What the text blocks may see: (B, 1, T, S), or None for "all before it", which PyTorch knows by itself."""
        past = cache.get_seq_length() if cache is not None else 0
        length = input_ids.shape[1]
        eager = self.config._attn_implementation == "eager"
        if first_key is None and not eager and (past == 0 or length == 1):
            return None
        key = torch.arange(past + length, device=input_ids.device)  # (S,)
        mask = (key <= key[past:, None])[None, None]  # (1, 1, T, S)
        if first_key is not None:
            mask = mask & (key >= first_key[:, None, :, None])  # (B, 1, T, S)
        if not eager:
            return mask
        return (
            torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(self.dtype).min).to(self.dtype)
        )


class VaLMForCausalLM(VaLMPreTrainedModel, GenerationMixin):
    """VaLM with a language-model head, in the ways of Hugging Face: `from_pretrained`, `generate`, `Trainer`.

    A document begins at every `bos_token_id` (SOT) and after padding. Positions start anew there, and no token
    sees one of an earlier document in any block. Padding may be on either side for training and scoring, on the left
    for `generate()`.

    Pictures come in one of two ways: as `image_pool` and `image_index`, or from a retriever given to
    `set_retriever`, which then serves every forward pass and `generate()` token by token. Without either, or
    with num_images = 0, the model is a GPT-2.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (no ClassVar in transformers)

    def __init__(self, config: ValmConfig):
        super().__init__(config)
        self.transformer = VaLMModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._retriever: ImageRetriever | None = None
        self.post_init()

    @classmethod
    def from_gpt2(
        cls, gpt2: GPT2LMHeadModel, *, image_logit_bias_init: float = -10.0, **arguments: Any
    ) -> "VaLMForCausalLM":
        """A VaLM that starts from a pretrained GPT-2: same weights, pictures closed by a negative image_logit_bias.

        At -10 a picture weighs e^-10 of a word with the same score: the logits are GPT-2's to about four digits, and
        there is still a gradient that can open the heads. The other arguments are those of `ValmConfig`.
        """
        config = gpt2.config.to_dict()
        for name in ("model_type", "architectures", "transformers_version"):
            config.pop(name, None)
        config |= arguments | {"image_logit_bias_init": image_logit_bias_init}
        model = cls(ValmConfig(**config))
        model.to(dtype=gpt2.dtype)  # type: ignore[call-arg]  # transformers wraps `to` so that self is lost
        model.load_state_dict(gpt2.state_dict(), strict=False)
        return model

    @property
    def retriever(self) -> ImageRetriever | None:
        """What finds the pictures where none are given to `forward`."""
        return self._retriever

    def set_retriever(self, retriever: ImageRetriever | None) -> None:
        """Let `retriever` find the pictures of every token; a blind model takes a `BlindRetriever`. None: no longer.

        Raises:
            ValmError: it finds other pictures than the model takes: blind or not, how many, of which dimension.
        """
        if retriever is not None:
            config = self.config
            if config.blind != isinstance(retriever, BlindRetriever):
                kind = "a BlindRetriever" if config.blind else "a Retriever"
                raise ValmError(
                    f"this model needs {kind} (blind={config.blind} in its config), got a {type(retriever).__name__}"
                )
            for name, found, option in (("k", retriever.k, "num_images"), ("dim", retriever.dim, "image_dim")):
                if found != getattr(config, option):
                    raise ValmError(
                        f"retriever.{name} is {found}, but this model was made for {getattr(config, option)} "
                        f"({option} in its config)"
                    )
        self._retriever = retriever

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: VaLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, P + T), 0 at padding, with P the tokens already in the cache. None = no padding.
            image_pool: (U, E) float, the picture vectors of this batch, each once.
            image_index: (B, T, K) int32 or int64 rows of the pool, -1 = no picture in this slot.
            position_ids: (B, T) int64; by default the distance from the document's first token.
            cache: what an earlier call with use_cache=True returned; this call adds to it.
            labels: (B, T) int64, input_ids with -100 where nothing is to be learned; shifted inside.
            use_cache: return the cache, to go on from.
            logits_to_keep: only the last so many positions' logits; 0 = all.

        Raises:
            ValueError: a shape or value does not fit the model; the message says which.
        """
        config = self.config
        if use_cache and cache is None:
            cache = VaLMCache()
        first_key, present = self._documents(input_ids, attention_mask, cache)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device) - first_key
            if present is not None:
                position_ids = position_ids.masked_fill(~present, 0)
        if position_ids.device.type == "cpu" and int(position_ids.max()) >= config.n_positions:
            raise ValueError(
                f"input_ids has a document of at least {int(position_ids.max()) + 1} tokens, "
                f"but this model has {config.n_positions} positions; split it"
            )
        if image_pool is None and self._retriever is not None:
            image_pool, image_index = self._retrieve(self._retriever, input_ids, attention_mask, cache)
        image_pool, image_index = self._check_images(input_ids, image_pool, image_index, present)

        hidden_states = self.transformer(input_ids, first_key, position_ids, image_pool, image_index, cache)
        if cache is not None:
            cache.first_key = first_key[:, -1]
        logits = self.lm_head(hidden_states[:, -logits_to_keep:])  # (B, T, V); -0 keeps all
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    @torch.no_grad()
    def fusion_attention(
        self, input_ids: Tensor, image_pool: Tensor, image_index: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The fusion block's joint attention weights: over text (B, H, T, T) and over pictures (B, H, T, K).

        Both together sum to 1 for every token. Arguments as in `forward`. This materialises the weights, which
        `forward` never does: for pictures and explanations, on texts of ordinary length.
        """
        stack, index = self.transformer, self.config.fusion_index
        first_key, present = self._documents(input_ids, attention_mask, None)
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) - first_key
        pool, rows = self._check_images(input_ids, image_pool, image_index, present)
        hidden_states = stack(input_ids, first_key, position_ids, None, None, None, num_blocks=index)
        block = cast(VisualFusionBlock, stack.h[index])
        return block.attn.weights(block.ln_1(hidden_states), pool, rows, first_key)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **arguments: Any
    ) -> Any:
        """`GenerationMixin.generate` with a cache that also holds the retriever's state.

        Raises:
            ValueError: attention_mask pads on the right.
        """
        mask = arguments.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask pads on the right; generate() continues the last column: pad on the left")
        use_cache = arguments.get("use_cache", (generation_config or self.generation_config).use_cache)
        if use_cache is not False:
            arguments.setdefault("cache", VaLMCache())
        return super().generate(inputs, generation_config, **arguments)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("position_ids", None)  # forward knows documents, generate() does not
        return inputs

    def _documents(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: VaLMCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """first_key (B, T) int32, where each token's document begins, and where a token is, (B, T) bool or None."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape (batch, tokens) with tokens, got {tuple(input_ids.shape)}")
        batch, length = input_ids.shape
        if cache is not None and not isinstance(cache, VaLMCache):
            raise TypeError(f"cache must be a VaLMCache, got {type(cache).__name__}")
        past = cache.get_seq_length() if cache is not None else 0
        begins = input_ids == (-1 if self.config.bos_token_id is None else self.config.bos_token_id)  # (B, T)
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
        index = torch.arange(past, past + length, dtype=torch.int32, device=input_ids.device)
        start = torch.zeros(batch, dtype=torch.int32, device=input_ids.device)
        if past > 0 and cache is not None and cache.first_key is not None:
            start = cache.first_key
        first_key = torch.where(begins, index, start[:, None]).cummax(dim=1).values
        return first_key, present

    @staticmethod
    def _retrieve(
        retriever: ImageRetriever, input_ids: Tensor, attention_mask: Tensor | None, cache: VaLMCache | None
    ) -> tuple[Tensor, Tensor]:
        if cache is None:
            found = retriever(input_ids, attention_mask)
        else:
            if cache.retrieval is None:
                cache.retrieval = retriever.start(input_ids.shape[0])
            new_mask = attention_mask[:, -input_ids.shape[1] :] if attention_mask is not None else None
            found = retriever.step(input_ids, cache.retrieval, new_mask)
        return found.image_pool.to(input_ids.device), found.image_index.to(input_ids.device)

    def _check_images(
        self, input_ids: Tensor, pool: Tensor | None, index: Tensor | None, present: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The pictures as the blocks take them: none at padding, None for none at all."""
        if (pool is None) != (index is None):
            raise ValueError("image_pool and image_index must be given together")
        if pool is None or index is None:
            return None, None
        if self.config.num_images == 0:
            raise ValueError("image_pool was given to a model with num_images = 0 (GPT-2*), which sees no pictures")
        if pool.dim() != 2 or pool.shape[1] != self.config.image_dim:
            raise ValueError(
                f"image_pool must have shape (U, image_dim = {self.config.image_dim}), got {tuple(pool.shape)}"
            )
        if index.dim() != 3 or index.shape[:2] != input_ids.shape:
            raise ValueError(
                f"image_index must have shape (B, T, K), (B, T) = {tuple(input_ids.shape)}, got {tuple(index.shape)}"
            )
        if pool.shape[0] == 0:
            return None, None
        if present is not None:
            index = index.masked_fill(~present[..., None], -1)
        return pool, index


AutoModelForCausalLM.register(ValmConfig, VaLMForCausalLM)
