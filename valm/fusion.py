"""The fusion block: a GPT-2 block whose attention also sees the images of each token.

For the token at position i, with the block's own W_k and W_v for both text and images
(Wang et al. 2022, equations 3-7)::

    image_k = W_k LN_img(z) + b^K_img      image_v = W_v LN_img(z) + b^V_img
    [a_i | b_i] = softmax([scale q_i k_j | scale q_i image_k_ik + image_logit_bias + image_score_scale score_ik])
    out_i = sum_j a_ij v_j + sum_k b_ik image_v_ik

score_ik is the retrieval score of the image, which is used only with `image_score_scale_init` in the config.
The images z of a batch come as a pool without repetitions, are projected once and then gathered by index.
These attention weights have no dropout (published: 0.1); the residual dropouts are those of GPT-2.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from valm.config import ValmConfig
from valm_kernels import attention_weights, visual_fusion_attn


class _ImageTerms(TypedDict, total=False):
    """Image arguments of `visual_fusion_attn`; empty without images."""

    image_index: Tensor | None
    image_k_bias: Tensor
    image_v_bias: Tensor
    image_logit_bias: Tensor
    image_score_bias: Tensor
    image_slots: Tensor


def retrieval_prior(scale: Tensor, image_scores: Tensor, image_index: Tensor) -> Tensor:
    """image_score_bias (B, T, K) of `visual_fusion_attn`: `scale` (1,) times the retrieval scores (B, T, K), and 0
    where image_index (B, T, K) has no image, as -inf there would make the gradient of the scale NaN."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return scale.to(wide) * image_scores.to(wide).masked_fill(image_index < 0, 0)


class VisualFusionAttention(GPT2Attention):
    """GPT-2's self-attention joined with attention over images in one softmax.

    Besides GPT-2's weights it has LN_img, a key and a value bias for images, one score bias per head that can switch
    them on or off, and a projection if the image vectors have another dimension than the model; with
    image_score_scale_init also a scale of the retrieval scores. With num_images = 0 it has none of these.
    """

    def __init__(self, config: ValmConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        if config.fusion_scale == "embed_dim":
            self.scaling = self.embed_dim**-0.5
        elif config.scale_attn_by_inverse_layer_idx:
            self.scaling = self.head_dim**-0.5 / (layer_idx + 1)
        else:
            self.scaling = self.head_dim**-0.5
        if config.num_images == 0:
            return
        self.image_proj = None
        if config.image_dim != self.embed_dim:
            self.image_proj = nn.Parameter(torch.empty(self.embed_dim, config.image_dim))
        self.ln_img = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.image_k_bias = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.image_v_bias = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.image_logit_bias = nn.Parameter(torch.full((self.num_heads,), float(config.image_logit_bias_init)))
        self.image_score_scale = None
        if config.image_score_scale_init is not None:
            self.image_score_scale = nn.Parameter(torch.full((1,), float(config.image_score_scale_init)))

    def forward(
        self,
        hidden_states: Tensor,  # (B, T, C)
        image_pool: Tensor | None,  # (U, E)
        image_index: Tensor | None,  # (B, T, K) rows of the pool, -1 = no image
        image_scores: Tensor | None,  # (B, T, K) retrieval scores
        first_key: Tensor | None,  # (B, T) int32, None = all keys
        cache: Cache | None,
        image_slots: Tensor | None = None,  # of sort_image_slots
    ) -> Tensor:  # (B, T, C)
        q, k, v = self._project_text(hidden_states)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        image_k, image_v = self._project_images(image_pool)
        out = visual_fusion_attn(
            q,
            k,
            v,
            image_k,
            image_v,
            **self._image_terms(image_pool, image_index, image_scores, image_slots),
            first_key=first_key,
            scale=self.scaling,
        )
        # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))

    def weights(
        self,
        hidden_states: Tensor,
        image_pool: Tensor | None,
        image_index: Tensor | None,
        image_scores: Tensor | None,
        first_key: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The joint attention weights over text, (B, H, T, T), and over images, (B, H, T, K); float32."""
        q, k, _ = self._project_text(hidden_states)
        image_k, _ = self._project_images(image_pool)
        terms = self._image_terms(image_pool, image_index, image_scores)
        text, images, _ = attention_weights(
            q,
            k,
            image_k,
            image_index=terms.get("image_index"),
            image_k_bias=terms.get("image_k_bias"),
            image_logit_bias=terms.get("image_logit_bias"),
            image_score_bias=terms.get("image_score_bias"),
            first_key=first_key,
            scale=self.scaling,
        )
        return text, images

    def _project_text(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """(B, T, C) -> q, k, v, each (B, H, T, D)."""
        qkv = self.c_attn(hidden_states).split(self.split_size, dim=-1)
        return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in qkv)

    def _project_images(self, pool: Tensor | None) -> tuple[Tensor | None, ...]:
        """(U, E) -> image_k, image_v, each (H, U, D)."""
        if pool is None:
            return None, None
        weight = self.c_attn.weight[:, self.split_size :]  # (C, 2 C): W_k and W_v, shared with the text
        pool = pool.to(weight.dtype)
        if self.image_proj is not None:
            pool = nn.functional.linear(pool, self.image_proj)  # (U, C)
        kv = (self.ln_img(pool) @ weight).split(self.split_size, dim=-1)
        return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1) for x in kv)

    def _image_terms(
        self, pool: Tensor | None, index: Tensor | None, scores: Tensor | None, slots: Tensor | None = None
    ) -> _ImageTerms:
        if pool is None or index is None:
            return {}
        terms: _ImageTerms = {
            "image_index": index,
            "image_k_bias": self.image_k_bias,
            "image_v_bias": self.image_v_bias,
            "image_logit_bias": self.image_logit_bias.to(
                torch.promote_types(self.image_logit_bias.dtype, torch.float32)
            ),
        }
        if self.image_score_scale is not None and scores is not None:
            terms["image_score_bias"] = retrieval_prior(self.image_score_scale, scores, index)
        if slots is not None:
            terms["image_slots"] = slots
        return terms


class VisualFusionBlock(GPT2Block):
    """A pre-LN GPT-2 block around `VisualFusionAttention`: attention, residual, MLP, residual."""

    attn: VisualFusionAttention

    def __init__(self, config: ValmConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.attn = VisualFusionAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,  # (B, T, C)
        image_pool: Tensor | None,  # (U, E)
        image_index: Tensor | None,  # (B, T, K)
        image_scores: Tensor | None,  # (B, T, K)
        first_key: Tensor | None,  # (B, T)
        cache: Cache | None,
        image_slots: Tensor | None = None,
    ) -> Tensor:  # (B, T, C)
        images = (image_pool, image_index, image_scores)
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), *images, first_key, cache, image_slots)
        return hidden_states + self.mlp(self.ln_2(hidden_states))
