"""Scoring shared by all evaluations: the likelihood of an answer after a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import begin_id
from valm.errors import ValmError
from valm.model.checkpoint import positions
from valm.model.image_model import ImageModel

# Called with the number of texts done since the last call.
Progress: TypeAlias = "Callable[[float], object] | None"


def answer_tokens(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]) -> list[list[int]]:
    """The token ids of each answer as the next word of a text."""
    before = ":"
    skip = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    return [tokenizer(f"{before} {answer}", add_special_tokens=False)["input_ids"][skip:] for answer in answers]


def check_writable(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """Checks that the tokenizer can write every answer. Raises ValmError if an answer consists of no tokens, or
    contains the unknown token."""
    for answer, ids in zip(answers, tokens, strict=True):
        if not ids:
            raise ValmError(f"the answer {answer!r} has no tokens")
        if tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id:
            raise ValmError(f"the tokenizer cannot write the answer {answer!r}: it becomes {tokenizer.unk_token}")


def check_single_tokens(answers: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """Checks that every answer is one token, which the published protocol needs. Raises ValmError if an answer is not
    one token."""
    for answer, ids in zip(answers, tokens, strict=True):
        if len(ids) != 1:
            raise ValmError(
                f"{answer!r} is {len(ids)} tokens for this tokenizer, but the published protocol compares single "
                "tokens: use the fair protocol"
            )


def last_tokens(texts: Sequence[list[int]], room: int, context: int) -> list[list[int]]:
    """The last tokens of each text that fit into a `context`, next to an answer that needs `room`. Raises ValmError if
    no token fits."""
    if room < 1:
        raise ValmError(f"the model reads {context} tokens, too few for the longest answer and a prompt")
    return [ids[-room:] for ids in texts]


@torch.no_grad()
def answer_log_probs(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    bos: bool = True,
    batch_size: int = 64,
    progress: Progress = None,
) -> torch.Tensor:
    """log p(answer | prompt), summed over the answer's tokens: (prompts, answers) float32.

    A batch contains texts of equal length, so there is no padding and no score depends on the batch. A prompt that is
    too long for the model is cut to its last tokens.

    Args:
        model: a causal language model of transformers, with or without images.
        bos: begin each prompt with SOT, as every document in training does.

    Raises:
        ValmError: a prompt or answer is empty, an answer is too long for the model, or the model sees images but has no
            retriever.
    """
    check_model(model)
    tokenized = answer_tokens(tokenizer, answers)
    start = [begin_id(tokenizer)] if bos else []
    context = context_length(model)
    room = context - max(map(len, tokenized), default=1) + 1 - len(start)
    read = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    texts = [start + ids for ids in last_tokens(read, room, context)]
    check_writable(tokenizer, answers, tokenized)
    if [] in texts:
        raise ValmError(f"prompt {prompts[texts.index([])]!r} has no tokens")

    # answers that agree up to their last token share a text; for one-token answers this is the prompt
    by_head = defaultdict(list)
    for i, ids in enumerate(tokenized):
        by_head[tuple(ids[:-1])].append(i)
    scores = torch.empty(len(texts), len(answers))
    with one_product(model):
        for head, members in by_head.items():
            answer_ids = torch.tensor([tokenized[i] for i in members], device=model.device)  # (answers here, tokens)
            for rows in equal_lengths(texts, batch_size):
                batch = torch.tensor([texts[row] + list(head) for row in rows], device=model.device)
                # slice again: some classes take logits_to_keep and return all logits
                logits = model(batch, logits_to_keep=len(head) + 1).logits[:, -(len(head) + 1) :].float()
                places = torch.arange(len(head) + 1)
                log_probs = logits.log_softmax(-1)[:, places, answer_ids]  # (b, answers here, tokens)
                scores[torch.tensor(rows)[:, None], torch.tensor(members)] = log_probs.sum(-1).cpu()
                if progress:
                    progress(len(rows) / len(by_head))
    return scores


def check_model(model: Any) -> None:
    """Raises ValmError if a model that takes images has no retriever."""
    if isinstance(model, ImageModel) and model.fusion_options.num_images > 0 and model.retriever is None:
        raise ValmError(f"this model sees {model.fusion_options.num_images} images a token: set a retriever first")


def context_length(model: Any) -> int:
    """The maximum number of tokens that the model reads at once; a large number if its config sets no limit."""
    return positions(model) or 1 << 20


@contextmanager
def one_product(model: Any) -> Iterator[None]:
    """Within the block, computes the logits of a batch in one product.

    The last states of each text are a view, for which PyTorch computes a product per text and reads all output
    embeddings each time. So the output layer gets a copy.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, inputs: tuple(each.contiguous() for each in inputs))
    try:
        yield
    finally:
        hook.remove()


def equal_lengths(texts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts in batches, each of texts of one length."""
    by_length = defaultdict(list)
    for row, text in enumerate(texts):
        by_length[len(text)].append(row)
    for rows in by_length.values():
        for begin in range(0, len(rows), batch_size):
            yield rows[begin : begin + batch_size]
