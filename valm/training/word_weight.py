"""A training loss in which given words count more where the model sees images.

Few words of a corpus name what its images show. The loss is therefore mostly over tokens that need no image, and the
fusion layer learns slowly to read images (docs/results/study.md).
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
        words: found by their tokens, at the beginning of a text and after a space, in the given case.

    Raises:
        ValmError: the model does not compute its loss by its `loss_function`.
    """

    def __init__(self, model: Any, words: Iterable[str], weight: float, tokenizer: PreTrainedTokenizerFast):
        self._weight = weight
        self._words = _by_length(words, tokenizer)
        self._weighted: Tensor | None = None  # (B, T) of the last call: whether the next token has the weight
        self._loss_of_model = model.loss_function
        self._calls = 0
        model.loss_function = self._loss
        decoder = model.get_decoder() if model.base_model is model else model.base_model
        decoder.register_forward_pre_hook(self._note, with_kwargs=True)  # after the hook that finds the images
        ids = probe_tokens(model)
        with torch.no_grad(), in_mode(model, training=False), torch.random.fork_rng():
            model(input_ids=ids, labels=ids, **no_images(model, ids))
        if not self._calls:
            raise ValmError(f"the loss of {type(model).__name__} cannot be weighted: leave image_words out")

    def _note(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, index = kwargs.get("input_ids"), kwargs.get("image_index")
        self._weighted = None
        if decoder.training and ids is not None and index is not None:
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
        self._calls += 1
        if self._weighted is None:
            given = {"num_items_in_batch": num_items_in_batch, **more}
            return self._loss_of_model(logits=logits, labels=labels, vocab_size=vocab_size, **given)
        following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), following, ignore_index=IGNORED, reduction="none")
        weighted = self._weighted.to(logits.device).flatten()
        count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return torch.where(weighted, self._weight * losses, losses).sum() / count


def _by_length(words: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> dict[int, Tensor]:
    """The tokens of the words, alone and after a space, by number of tokens: {length: (words, length) int64}."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            found.setdefault(len(ids), set()).add(ids)
    return {length: torch.tensor(sorted(some)) for length, some in found.items()}
