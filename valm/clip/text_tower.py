"""open_clip's causal text tower, run on two streams at once and with cached keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor

from valm.clip.clip import Clip
from valm.clip.linear import FEW_ROWS, Int8Linear, Linear, PackedLinear, check_int8, linear
from valm.errors import ValmError
from valm_kernels import visual_fusion_attn
from valm_kernels.int8_rows import Int8Layer, has_avx2, is_int8_fast
from valm_kernels.text_blocks import FloatLayer, TextBlock, TextBlocks

# New segments are padded to a multiple of this length. PyTorch's flash attention on CPUs sums vectors of 16 numbers,
# and rounds differently in a partial vector. So a segment's states do not depend on other segments in a call.
ROW_MULTIPLE = 16


class BlockLinear(NamedTuple):
    """The linear layers of a block."""

    attention_in: Linear
    attention_out: Linear
    mlp_in: Linear
    mlp_out: Linear


class _Rows:
    """The places of T tokens of N segments, and of A EOTs, in the attention: rows of L, the longest segment padded to a
    `multiple`, for each of S streams."""

    def __init__(self, lengths: list[int], eot_after: list[int] | None, multiple: int, device: torch.device):
        count, longest = torch.tensor(lengths), -(-max(lengths) // multiple) * multiple
        padding = torch.arange(len(lengths)) * longest - count.cumsum(0) + count  # before each segment
        place = torch.arange(sum(lengths)) + padding.repeat_interleave(count)
        places = [place] if eot_after is None else [place, place[eot_after]]  # (T,), (A,)
        self.shape = len(places), len(lengths), longest
        state = torch.zeros(len(places), len(lengths) * longest, dtype=torch.int64)  # padding reads the first token
        first = 0
        for stream, here in zip(state, places, strict=True):
            stream[here] = torch.arange(first, first := first + len(here))
        self.is_whole = first == state.numel()
        self.state, self.places = state.flatten().to(device), [here.to(device) for here in places]

    def pad(self, states: Tensor) -> Tensor:
        """(T + A, W) to (S, N, L, W)."""
        return (states if self.is_whole else states.index_select(0, self.state)).unflatten(0, self.shape)

    def unpad(self, mixed: list[Tensor]) -> Tensor:
        """Attention (N, H, L, D) of all streams to (T + A, W), or of only the EOTs to (A, W)."""
        streams = [stream.transpose(1, 2).flatten(2).flatten(0, 1) for stream in mixed]
        if not self.is_whole:
            places = self.places[-len(mixed) :]
            streams = [stream.index_select(0, here) for stream, here in zip(streams, places, strict=True)]
        return torch.cat(streams)


class TextTower:
    """The text tower of `clip` in `dtype`, with its last projection in float32 or wider.

    Any open_clip text transformer works whose feature is the state at EOT under a causal mask. int8 quantises the
    linear layers of the tower's blocks (`Int8Linear`); the rest is then float32.

    Raises:
        ValmError: the tower sees later tokens (bidirectional towers: SigLIP, CLIPA, most MobileCLIPs, Hugging Face
            encoders), pools elsewhere (CoCa's class token after the text), or its blocks are not standard pre-LN
            blocks; or int8 would be slow (`check_int8`).
    """

    def __init__(self, clip: Clip, dtype: torch.dtype):
        self.dtype = dtype
        tower: Any = getattr(clip.model, "text", clip.model)  # open_clip has no types
        _check(tower, clip.name)
        modules: Any = torch.nn.ModuleDict(
            {"embedding": tower.token_embedding, "blocks": tower.transformer.resblocks, "norm": tower.ln_final}
        )
        make: Callable[[Tensor, Tensor], Linear] = linear
        if dtype == torch.int8:
            check_int8(clip.device)
            make, dtype = Int8Linear, torch.float32
        if next(modules.parameters()).dtype != dtype:
            modules = copy.deepcopy(modules).to(dtype)
        self.embedding: torch.nn.Embedding = modules["embedding"]
        self.blocks: Any = modules["blocks"]
        # for each block: queries, keys and values; output of the attention; first and second layer of the MLP
        self.linear = [
            BlockLinear(
                make(block.attn.in_proj_weight, block.attn.in_proj_bias),
                *(make(one.weight, one.bias) for one in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)),
            )
            for block in self.blocks
        ]
        self.native_blocks = _native_blocks(self.blocks, self.linear)
        self.norm = modules["norm"]
        self.positions: Tensor = tower.positional_embedding.to(dtype)  # (context_length, W)
        self.wide = torch.promote_types(dtype, torch.float32)
        projection = tower.text_projection
        self.projection: Tensor | None
        self.projection_bias: Tensor | None
        if isinstance(projection, torch.nn.Linear):  # in some towers a module with a bias
            self.projection, self.projection_bias = projection.weight.T.to(self.wide), projection.bias.to(self.wide)
        else:
            self.projection = None if projection is None else projection.to(self.wide)  # (W, E)
            self.projection_bias = None
        self.eot = clip.tokenizer.eos_token_id
        self.heads = self.blocks[0].attn.num_heads
        self.head_dim = self.blocks[0].attn.head_dim

    def run(
        self,
        ids: Tensor,
        lengths: list[int],
        *,
        positions: Tensor,
        eot_after: list[int] | None = None,
        first_key: list[int] | None = None,
        past: Tensor | None = None,
        keep: bool = False,
        step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states of the tokens of N segments, before the last LayerNorm.

        Linear layers read all tokens in one row. For the attention each segment is a row of L tokens, padded on the
        right.

        Args:
            ids: (T,) int64, segment after segment.
            lengths: the number of tokens of each segment.
            positions: (T,) int64, each token's position in its segment.
            eot_after: ascending numbers of A tokens: returns the state of an EOT right after each of these tokens.
                EOTs are a second stream: the EOT after position t sees the text up to t and itself, through
                `visual_fusion_attn` with its own key as the only "image". None returns the states of all tokens.
            past: (layers, 2, N, H, P, D), keys and values of earlier tokens, in any order, because they contain the
                positions.
            first_key: for each segment the first of the P + L keys that its tokens see; by default all keys.
            keep: also return keys and values; otherwise buffers are reused, which avoids page faults on CPU.
            step: read the tokens in one native call if that is faster; it rounds differently.

        Returns:
            States (T, W) or (A, W), and the keys and values (layers, 2, N, H, L, D) if `keep` or `step`.
        """
        hidden = self.embedding(ids) + self.positions[positions]  # (T, W)
        if eot_after is not None:
            ends = self.embedding.weight[self.eot] + self.positions[positions[eot_after] + 1]
            hidden = torch.cat([hidden, ends])  # (T + A, W)

        # in int8 for any number of rows, so that rounding does not depend on the batch
        if self.native_blocks is not None and step and (self.dtype == torch.int8 or len(hidden) <= FEW_ROWS):
            return self._step(self.native_blocks, hidden, lengths, eot_after, first_key, past)

        rows = _Rows(lengths, eot_after, ROW_MULTIPLE if past is None else 1, ids.device)
        first = None if first_key is None else torch.tensor(first_key, dtype=torch.int32, device=ids.device)
        present = []
        for layer, block in enumerate(self.blocks):
            layers = self.linear[layer]
            projected = rows.pad(layers.attention_in(block.ln_1(hidden)))  # (S, N, L, 3W)
            # (3, S, N, H, L, D)
            q, k, v = projected.unflatten(-1, (3, self.heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
            if keep:
                present.append(torch.stack([k[0], v[0]]))
            streams = q.unbind()
            if eot_after is not None and block is self.blocks[-1]:  # the last block needs only the EOTs
                streams, hidden = streams[1:], hidden[len(ids) :]
            before = None if past is None else past[layer]
            if before is not None and max(lengths) == 1:
                mixed = _attend_next(streams, k, v, before, first)
            else:
                mixed = _attend(streams, k, v, before, first)
            hidden += block.ls_1(layers.attention_out(rows.unpad(mixed)))
            wide = _activate(block.mlp.gelu, layers.mlp_in(block.ln_2(hidden)))  # (T + A or A, 4W)
            hidden += block.ls_2(layers.mlp_out(wide))
        return hidden, torch.stack(present) if keep else hidden.new_empty(0)

    def _step(
        self,
        blocks: TextBlocks,
        hidden: Tensor,
        lengths: list[int],
        eot_after: list[int] | None,
        first_key: list[int] | None,
        past: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`run` in one native call; hidden (T + A, W) is the tokens and the EOTs."""
        if past is None:
            past = hidden.new_empty(len(self.blocks), 2, len(lengths), self.heads, 0, self.head_dim)
        states, projected = blocks.step(hidden, lengths, past, eot_after=eot_after or (), first_key=first_key or ())
        width = self.heads * self.head_dim
        tokens = projected[:, : sum(lengths), width:].transpose(0, 1)  # (T, layers, 2 W), without the queries
        if min(lengths) == max(lengths):
            rows = tokens.unflatten(0, (len(lengths), -1))  # (N, L, layers, 2 W)
        else:
            (rows,) = _Rows(lengths, None, 1, hidden.device).pad(tokens)
        return states, rows.unflatten(3, (2, self.heads, self.head_dim)).permute(2, 3, 0, 4, 1, 5)

    def project(self, states: Tensor) -> Tensor:
        """Text features (n, E) float32, L2-normalised, from final hidden states (n, W)."""
        features = self.norm(states).to(self.wide)
        if self.projection is not None:
            features = features @ self.projection
        if self.projection_bias is not None:
            features = features + self.projection_bias
        return F.normalize(features, dim=-1).float()


def _attend(
    streams: Sequence[Tensor], k: Tensor, v: Tensor, past: Tensor | None, first_key: Tensor | None
) -> list[Tensor]:
    """The attention (N, H, L, D) of each of `streams`: the text, the EOTs, or both.

    Args:
        streams: queries (N, H, L, D); EOTs, if any, are the last stream.
        k, v: (S, N, H, L, D), of the text and, if S is 2, of the EOTs.
        past: keys and values (2, N, H, P, D) of earlier tokens.
    """
    keys, values = k[0], v[0]
    if past is not None:
        keys, values = (torch.cat(both, 2) for both in zip(past, (keys, values), strict=True))
    first_keys = None if first_key is None else first_key[:, None].repeat(1, k.shape[3])  # (N, L)
    own: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]
    if len(k) == 2:
        own.append((k[1].unsqueeze(3), v[1].unsqueeze(3)))  # (N, H, L, 1, D)
    return [
        visual_fusion_attn(q, keys, values, *images, first_key=first_keys)
        for q, images in zip(streams, own[-len(streams) :], strict=True)
    ]


def _attend_next(
    streams: Sequence[Tensor], k: Tensor, v: Tensor, past: Tensor, first_key: Tensor | None
) -> list[Tensor]:
    """As `_attend`, for one new token of each segment: both streams in one call, which is faster for few queries."""
    keys, values = (torch.cat([old, *new], 2) for old, new in zip(past, (k, v), strict=True))  # (N, H, P + S, D)
    place = torch.arange(keys.shape[2], device=keys.device)
    seen = place <= place[-len(streams) :, None]  # (streams, P + S): the text does not see the EOT
    if first_key is not None:
        seen = seen & (place >= first_key[:, None, None, None])  # (N, 1, streams, P + S)
    return list(F.scaled_dot_product_attention(torch.cat(list(streams), 2), keys, values, attn_mask=seen).split(1, 2))


def _native_blocks(blocks: Sequence[Any], layers: list[BlockLinear]) -> TextBlocks | None:
    """The blocks for a native call that reads a few tokens; None if a block has unsupported parts."""
    found, quick_gelu = [], isinstance(blocks[0].mlp.gelu, QuickGELU)
    for block, of_block in zip(blocks, layers, strict=True):
        native_layers = [layer for layer in map(_native_layer, of_block) if layer is not None]
        norms, activation = (block.ln_1, block.ln_2), block.mlp.gelu
        gelu = isinstance(activation, torch.nn.GELU) and activation.approximate == "none"
        same = isinstance(activation, QuickGELU) if quick_gelu else gelu
        plain = all(isinstance(scale, torch.nn.Identity) for scale in (block.ls_1, block.ls_2)) and all(
            isinstance(norm, torch.nn.LayerNorm) and norm.bias is not None for norm in norms
        )
        if len(native_layers) < len(of_block) or not plain or not same:
            return None
        attention_in, attention_out, mlp_in, mlp_out = native_layers
        found.append(TextBlock(block.ln_1, attention_in, attention_out, block.ln_2, mlp_in, mlp_out))
    return TextBlocks(found, blocks[0].attn.num_heads, quick_gelu)


def _native_layer(layer: Linear) -> FloatLayer | Int8Layer | None:
    """The layer for `TextBlocks`; None if it is unsupported or slower."""
    if isinstance(layer, Int8Linear):
        return layer.layer
    if not isinstance(layer, PackedLinear) or layer.weight.dtype != torch.float32 or not has_avx2():
        return None
    return FloatLayer(layer.weight, layer.bias) if layer.bias is not None and layer.weight.is_contiguous() else None


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The precision in which a text tower is fast on `device` (docs/results/queries.md)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.int8 if device.type == "cpu" and is_int8_fast() else torch.float32


def _activate(activation: torch.nn.Module, states: Tensor) -> Tensor:
    """activation(states), in place if PyTorch supports that."""
    if isinstance(activation, torch.nn.GELU):
        return torch.ops.aten.gelu_(states, approximate=activation.approximate)
    return activation(states)


def _check(tower: Any, name: str) -> None:
    """Checks that a text tower can compute queries."""

    def refuse(reason: str) -> ValmError:
        return ValmError(f"the CLIP {name} cannot be used for context queries: {reason}")

    if isinstance(tower, HFTextEncoder):
        raise refuse("its text tower is a Hugging Face encoder, in which a token sees later tokens")
    if tower.attn_mask is None:
        raise refuse("its text tower is bidirectional: a token sees later tokens")
    if getattr(tower, "cls_emb", None) is not None:
        raise refuse("its text feature is the state of a class token after the text, not of EOT")
    pool_type = tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type
    if pool_type not in ("argmax", "eos"):
        raise refuse(f"its text feature is pooled by {pool_type!r}, not at EOT")
    for block in tower.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock:
            raise refuse(f"its text tower has blocks of type {type(block).__name__}, not the standard type")
