"""A training loss in which given words count more where the model sees images.

Few words of a corpus name what its images show. The loss is therefore mostly over tokens that need no image, and the
fusion layer learns slowly to read images (studies/color/plan.md measures it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from valm.errors import ValmError
from valm.model.probe import in_mode, probe_tokens
from valm.training.cache_below import no_images
from valm.training.collate import IGNORED


class WordWeight:
    """Multiplies the loss of `model`, in training mode, by `weight` at each token of `words` whose preceding token sees
    an image.

    The loss of a token is the cross entropy of the token with the preceding logits. The sum of the products is divided
    by the number of tokens, as it is without weights, so the loss of a step does not depend on how its documents are
    divided among batches and processes. The model is changed; its weights and their names stay the same.

    Args:
        model: a causal language model with images whose loss is that of the next token
            (`valm.training.next_token_loss.has_next_token_loss`).
        words: found by their tokens, at the beginning of a text and after a space, in the given case. A longer word
            that begins with these tokens is weighted at them too.

    Raises:
        ValmError: the model is not called with token ids, or does not compute its loss by its `loss_function`.
    """

    def __init__(self, model: Any, words: Iterable[str], weight: float, tokenizer: PreTrainedTokenizerFast):
        self._weight = weight
        self._words = _by_length(words, tokenizer)
        self._weighted: Tensor | None = None  # (B, T) of a call: whether the next token has the weight
        self._loss_of_model = model.loss_function
        self._works = False
        model.loss_function = self._loss
        for part in model.parts_with_ids():  # after the hooks that find the images
            part.register_forward_pre_hook(self._note, with_kwargs=True)
        ids = probe_tokens(model)
        with torch.no_grad(), in_mode(model, training=True), torch.random.fork_rng():
            model(input_ids=ids, labels=ids, **no_images(model, ids))
        if not self._works:
            raise ValmError(f"the loss of {type(model).__name__} cannot be weighted: leave image_words out")

    def _note(self, part: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, index = kwargs.get("input_ids"), kwargs.get("image_index")
        if ids is None:  # an outer part noted the ids of these embeddings
            return
        self._weighted = None
        if part.training and index is not None:
            self._weighted = F.pad(self._of_words(ids), (0, 1))[:, 1:] & (index >= 0).any(-1)

    def _of_words(self, ids: Tensor) -> Tensor:
        """(B, T) bool: whether a token belongs to one of the words."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for length, words in self._words.items():
            starts = ids.shape[1] - length + 1
            if starts > 0:
                windows = ids.unfold(1, length, 1)[:, :, None]  # (B, starts, 1, length)
                begins = (windows == words.to(ids.device)).all(-1).any(-1)
                for place in range(length):
                    found[:, place : place + starts] |= begins
        return found

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **more: Any
    ) -> Tensor:
        """logits: (B, T, V). labels: (B, T), which may be other numbers of the tokens (`LimitedSoftmax`)."""
        weighted, self._weighted = self._weighted, None
        if weighted is None:
            given = {"num_items_in_batch": num_items_in_batch, **more}
            return self._loss_of_model(logits=logits, labels=labels, vocab_size=vocab_size, **given)
        following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), following, ignore_index=IGNORED, reduction="none")
        losses = torch.where(weighted.to(losses.device).flatten(), self._weight * losses, losses)
        count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        self._works = True
        return losses.sum() / torch.as_tensor(count, device=losses.device)


def _by_length(words: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> dict[int, Tensor]:
    """The tokens of the words, alone and after a space, by number of tokens: {length: (words, length) int64}."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            found.setdefault(len(ids), set()).add(ids)
    return {length: torch.tensor(sorted(some)) for length, some in found.items()}
