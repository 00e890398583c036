"""A training loss over the tokens of the corpus and a random sample of the other tokens.

If most layers are frozen and their output is cached (`cache_below`), the product of the hidden states with the whole
vocabulary takes nearly all of a training step, though a small corpus contains few of its tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from valm.errors import ValmError
from valm.model.probe import in_mode, probe_tokens
from valm.training.cache_below import no_images
from valm.training.next_token_loss import check_own_loss

# Other tokens in the softmax of a step. Without them, no step would make other tokens less likely, and they become
# likelier with every change of the model.
SAMPLED = 2048


def limit_softmax(training: Trainer, model: Any, limited: bool) -> None:
    """The method limit_softmax: the training loss is over the tokens of the documents and a sample of the others."""
    check_own_loss(training, "limit_softmax", "leave limit_softmax (--limit-softmax) out")
    LimitedSoftmax(model, training.train_dataset)


class LimitedSoftmax:
    """Limits the logits and the loss of `model`, in training mode, to V' tokens: (B, T, V').

    The V' tokens are the tokens of `documents` and SAMPLED others, sampled again in every call with gradients. A call
    without gradients, such as the base's (`BaseDivergence`), has the tokens of the call before. Each sampled token
    stands for its share of all other tokens in the denominator, whose expected value is therefore exact (sampled
    softmax, Jean et al. 2015). Evaluation uses the whole vocabulary. The model is changed; its weights and their names
    stay the same.

    Args:
        model: a decoder of transformers whose logits are a linear layer of the hidden states, followed only by
            elementwise operations such as a scale or a cap.
        documents: as `Collator` takes them; they must have a length.

    Raises:
        ValmError: the model is no such decoder, or the documents have no length.
    """

    def __init__(self, model: Any, documents: Any):
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValmError(
                f"the softmax of {type(model).__name__} cannot be limited: its head is {type(head).__name__}"
            )
        if not hasattr(documents, "__len__"):
            raise ValmError("the softmax cannot be limited to the tokens of a stream, since they are not known yet")
        used = np.zeros(head.out_features, dtype=bool)
        for index in range(len(documents)):
            used[np.asarray(documents[index]["input_ids"])] = True
        self.tokens = torch.from_numpy(np.flatnonzero(used))  # tokens of the documents
        self._others = torch.from_numpy(np.flatnonzero(~used))
        self._ranks = torch.full((len(used),), len(used))  # a token of no document is out of range
        self._ranks[self.tokens] = torch.arange(len(self.tokens))
        self._head = head
        self._sampled = SAMPLED
        self._sample = self._others[:0]
        self._loss_of_model = model.loss_function
        # not the class, which decides how the weights are saved and sharded
        vars(head)["forward"] = self._logits
        model.loss_function = self._loss
        try:
            self._check(model)
        except Exception:
            del vars(head)["forward"]
            model.loss_function = self._loss_of_model
            raise

    def _logits(self, hidden_states: Tensor) -> Tensor:
        weight, bias = self._head.weight, self._head.bias
        if not self._head.training:
            return F.linear(hidden_states, weight, bias)
        if torch.is_grad_enabled():
            self._sample = self._others[torch.randperm(len(self._others))[: self._sampled]]
        tokens = torch.cat((self.tokens, self._sample)).to(weight.device)
        return F.linear(hidden_states, weight[tokens], None if bias is None else bias[tokens])

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        size = logits.shape[-1]
        if self._head.training:
            labels = torch.where(labels < 0, labels, self._ranks.to(labels.device)[labels.clamp(min=0)])
            sampled = size - len(self.tokens)
            if sampled:  # not at the head, because some families scale or cap the logits after it
                # detached, because autograd would copy the logits; a constant does not change the gradient
                logits.detach()[..., len(self.tokens) :] += math.log(len(self._others) / sampled)
        return self._loss_of_model(logits=logits, labels=labels, vocab_size=size, **more)

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        """Checks that the logits are the chosen tokens' logits, and that the loss over all tokens is the model's loss.
        Raises ValmError if a result differs."""
        count = probe_tokens(model).shape[1]
        ids = self.tokens.repeat(count)[:count][None].to(model.device)
        call = {"input_ids": ids, "labels": ids, **no_images(model, ids)}
        with in_mode(model, training=False), torch.random.fork_rng():
            whole = model(**call)
            self._head.train()
            logits = model(**call).logits
            self._sample = self._others
            loss = model(**call).loss
        expected = whole.logits[..., self.tokens.to(whole.logits.device)]
        tolerance = torch.finfo(expected.dtype).eps ** 0.5
        same = logits.shape == expected.shape and torch.allclose(
            logits, expected, rtol=0, atol=tolerance * expected.abs().max().item()
        )
        if not same or not torch.allclose(loss, whole.loss, rtol=tolerance):
            raise ValmError(
                f"the softmax of {type(model).__name__} cannot be limited: its logits or its loss depend on more than "
                "the head's rows of the tokens"
            )
