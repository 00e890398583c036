"""Distilled queries, `query="self"`: a head of the language model itself predicts CLIP's query of each token.

`ContextEncoder` runs a second network, CLIP's text tower, over a second tokenization of the text, which costs more than
all the rest of a live retrieval. The head is two more blocks on the language model's own embeddings, which run for all
tokens at once. `valm.training.distill` trains it, with CLIP's queries as targets.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from valm.clip.clip import Clip, in_own_precision
from valm.clip.tokenizer import padded, prompt_ids
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.min_score import cut
from valm.retrieval.retriever import Retrieved, Retriever, VectorIndex

# Blocks of a query head. On the demo's model, two on the embeddings came far closer to CLIP's queries than one, or an
# MLP, on the input of the fusion layer (docs/results/queries.md has the numbers).
QUERY_BLOCKS = 2


class QueryHead(nn.Module):
    """Predicts the query of each token from the embeddings of the text up to it: blocks, LayerNorm, projection.

    Args:
        config: has the sizes and the attention implementation of the blocks.
        image_dim: E, dimension of a query.
    """

    def __init__(self, config: GPT2Config, image_dim: int):
        super().__init__()
        # numbered behind the model's own blocks, by which a block may scale its scores
        blocks: list[Any] = [GPT2Block(config, layer_idx=config.n_layer + i) for i in range(QUERY_BLOCKS)]
        for number, block in enumerate(blocks):
            block.attn.layer_idx = number  # in the head's own cache
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.out = nn.Linear(config.n_embd, image_dim)

    def forward(self, embeddings: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Queries (B, T, E) float32, L2-normalised.

        Args:
            embeddings: (B, T, C), those of tokens and positions together.
            mask: as of the model's text blocks, (B, 1, T, S), or None for plain causal attention.
            cache: has the keys and values of earlier tokens, and gets those of these.
        """
        states = embeddings
        for block in self.blocks:
            states = block(states, cache, attention_mask=mask, use_cache=cache is not None)
        return F.normalize(self.out(self.norm(states)).float(), dim=-1)


class QueryState:
    """What a query head has read of each row: keys and values, the mask, and where the document being read began."""

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.length = 0
        self.mask: Tensor | None = None  # (B, length), 0 at padding; None = no padding
        self.first_key: Tensor | None = None  # (B,)

    def mask_with(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of all tokens with that of the next ones, `input_ids` and `mask` (B, T)."""
        if mask is None and self.mask is None:
            return None
        before = input_ids.new_ones(len(input_ids), self.length) if self.mask is None else self.mask
        return torch.cat([before, torch.ones_like(input_ids) if mask is None else mask], 1)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # any tensor of integers will do
        if self.mask is not None:
            self.mask = self.mask[rows]
        if self.first_key is not None:
            self.first_key = self.first_key[rows]


class SelfEncoder:
    """The queries of a model's own head, in the place of a `ContextEncoder`.

    Args:
        model: a `VaLMForCausalLM` with a query head.
        tokenizer: the model's.
        kb: names the CLIP, which only images from elsewhere need.
        clip, allow_download: as in `ImageKnowledgeBase.load_clip`.
    """

    query = "self"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        kb: ImageKnowledgeBase,
        *,
        clip: str | None = None,
        allow_download: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.kb = kb
        self._clip: dict[str, Any] = {"source": clip, "allow_download": allow_download}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) float32; zeros where attention_mask (B, T) is 0, and at the first token of a document."""
        with in_own_precision(input_ids.device):
            return self.model.self_queries(input_ids, attention_mask)

    def new_cache(self, batch: int) -> QueryState:
        """The state before the first token."""
        return QueryState()

    @torch.no_grad()
    def step(self, input_ids: Tensor, state: QueryState, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E) of the next tokens (B, T); `state` has the earlier ones, and gets these too."""
        mask = state.mask_with(input_ids, attention_mask)
        with in_own_precision(input_ids.device):
            queries = self.model.self_queries(input_ids, mask, state)
        state.mask = mask  # now that nothing was wrong
        return queries

    @functools.cached_property
    def clip(self) -> Clip:
        """The CLIP of the knowledge base.

        Raises:
            ValmError: it is missing.
        """
        return self.kb.load_clip(**self._clip)


class SelfRetriever(Retriever):
    """Finds the images nearest to the queries of a model's own head.

    Threads may share it while the model is in eval mode.

    Args:
        encoder, kb, k, index: as in `Retriever`; the device is the model's.
        cache_tokens: unused, as a state is never the same twice.

    Raises:
        ValmError: the model has no query head; the knowledge base was built with another CLIP than the head was trained
            for, or has fewer than `k` images.
    """

    encoder: Any  # a SelfEncoder

    def __init__(
        self,
        encoder: SelfEncoder,
        kb: ImageKnowledgeBase,
        k: int,
        index: VectorIndex | None = None,
        cache_tokens: int = 0,
    ):
        expected, found = getattr(encoder.model.config, "query_clip", None), kb.manifest["clip"]
        if expected is None:
            raise ValmError('query="self" needs a VaLM with a query head: train one with `valm distill`')
        if found["weights_hash"] != expected:
            raise ValmError(
                f"the model's query head was trained for the CLIP with weights {expected[:12]}, but the knowledge base "
                f"{kb.path} was built with {found['name']} ({found['weights_hash'][:12]}): give one of that CLIP, or "
                "train the head again with `valm distill`"
            )
        self._open(encoder, kb, k, index, cache_tokens, encoder.model.device)

    def find(self, input_ids: Tensor | Sequence[str], attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Retriever.find`, without a cache."""
        if not isinstance(input_ids, Tensor):
            input_ids, attention_mask = padded([prompt_ids(self.encoder.tokenizer, text) for text in input_ids])
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return cut(*self.nearest(self.encoder(input_ids.to(self.device), mask)), self.min_score)

    def step(self, input_ids: Tensor, state: Any, attention_mask: Tensor | None = None) -> Retrieved:
        """As `Retriever.step`, without a cache."""
        return self.retrieve(self.encoder.step(input_ids, state, attention_mask))

    def __reduce__(self) -> tuple[Any, ...]:
        # pickled by state: __init__ would read the model while it is still being unpickled
        return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]  # typeshed lacks it
