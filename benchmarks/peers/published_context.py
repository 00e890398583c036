"""The context queries of the published VaLM, rewritten from a description of its code.

Each segment gets its own forward pass: SOT, at most 75 tokens, EOT, and zeros up to 77 tokens. The states of its tokens
are the queries. While more than 75 tokens remain, the text is cut after the first separator within the next 75. The
first kind of separator that occurs there decides. Without a separator the text is cut after 75 tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from valm.clip.clip import Clip

SEPARATORS = (".", ";", "!", ":", ",", '."', ',"', '".', '",', ").", "),", "/", "-")


class PublishedContextEncoder:
    """(T,) ids to (T, E) queries, one 1 x 77 forward pass per segment."""

    def __init__(self, clip: Clip):
        self.model = clip.model
        self.sot, self.eot = clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id
        pieces = [self.eot, 0, *clip.tokenizer.convert_tokens_to_ids([piece + "</w>" for piece in SEPARATORS])]
        self.separators = pieces
        self.limit = clip.context_length - 2

    def segments(self, ids: list[int]) -> list[list[int]]:
        found = []
        while len(ids) > self.limit:
            window = ids[: self.limit]
            cut = next((window.index(id) + 1 for id in self.separators if id in window), self.limit)
            found.append(ids[:cut])
            ids = ids[cut:]
        return [*found, ids]

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> Tensor:
        model = self.model
        queries = []
        for segment in self.segments(ids):
            row = [self.sot, *segment, self.eot]
            row += [0] * (self.limit + 2 - len(row))
            ids = torch.tensor([row], device=model.positional_embedding.device)
            hidden = model.token_embedding(ids) + model.positional_embedding
            hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask.to(hidden.dtype)))
            features = hidden[0] @ model.text_projection
            queries.append(F.normalize(features[1 : 1 + len(segment)], dim=-1).float())
        return torch.cat(queries)
