"""A model's attention over text and images and its next words, as arrays (Figures 2 and 3 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import begin_id, prompt_ids
from valm.errors import ValmError
from valm.evaluation.controls import OtherImages
from valm.evaluation.scoring import answer_tokens, check_writable, context_length
from valm.explain.images import FindsImages, ShownImage, show_images
from valm.model.probe import in_mode
from valm.retrieval.retriever import BlindRetriever, Retrieved

# Limits the page: each token is a row of images and a row of the attention matrix.
MAX_TOKENS = 128
TOP_ANSWERS = 10


@dataclass(frozen=True)
class Explanation:
    """What a model attends to in a text of T tokens. Its fusion layer has H heads; each token has K images.

    Attributes:
        text: the prompt.
        tokens: T strings for display.
        text_weights: (H, T, T) float32, the attention of each token (row) over the tokens up to it.
        image_weights: (H, T, K) float32, the attention of each token over its own images, from the same softmax.
        image_index: (T, K) int64, rows of `images`, best first; -1 = no image.
        scores: (T, K) float32, inner product of the token's query and the image; -inf = no image.
        images: the U different images, each with a caption and, if there is one, a thumbnail.
        answers: A words, as given or likeliest first.
        probabilities: (A,) float32, the probability of each answer as the continuation of the text.
        note: why there are no images; empty if there are images.

    Example:
        >>> from valm.explain.explanation import explain
        >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
        >>> explanation = explain(model, tokenizer, "a picture of")
        >>> text, images = explanation.weights()
        >>> np.allclose(text.sum(-1) + images.sum(-1), 1, atol=1e-4)
        True
    """

    text: str
    tokens: tuple[str, ...]
    text_weights: np.ndarray
    image_weights: np.ndarray
    image_index: np.ndarray
    scores: np.ndarray
    images: tuple[ShownImage, ...]
    answers: tuple[str, ...]
    probabilities: np.ndarray
    note: str = ""

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The attention over text (T, T) and over images (T, K), float32, averaged over the heads."""
        return self.text_weights.mean(0), self.image_weights.mean(0)

    def images_of(self, token: int) -> list[ShownImage]:
        """The images of the token with this number, best first."""
        return [self.images[row] for row in self.image_index[token].tolist() if row >= 0]


def explain(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    retriever: FindsImages | None = None,
    with_images: bool = True,
    answers: Sequence[str] | None = None,
) -> Explanation:
    """Explains what `model` attends to while it reads `text`, and which words it predicts next.

    Args:
        model: a VaLM or an augmented decoder, as `valm.load` returns it.
        tokenizer: the model's tokenizer.
        text: the prompt, at most 128 tokens (MAX_TOKENS).
        retriever: replaces the model's own retriever; it may return fewer images a token than the model's K.
        with_images: False hides the images.
        answers: words whose probabilities to compute; by default, the 10 likeliest words (TOP_ANSWERS) of one token.

    Returns:
        The attention weights, the images and the answers' probabilities, as NumPy arrays.

    Raises:
        ValmError: the text is empty, or too long for the model or an explanation; the model needs images and has no
            retriever; or an answer has no tokens.

    Example:
        >>> from valm.explain.explanation import explain
        >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
        >>> explanation = explain(model, tokenizer, "a picture of")
        >>> heads, tokens, images = explanation.image_weights.shape
        >>> tokens == len(explanation.tokens)
        True
    """
    if model.training:  # dropout would make each explanation differ
        with in_mode(model, training=False):
            return explain(model, tokenizer, text, retriever=retriever, with_images=with_images, answers=answers)
    ids = _token_ids(model, tokenizer, text)
    note = _why_no_images(model, with_images)
    finder = retriever or model.retriever
    if note:
        finder = None
    elif finder is None:
        raise ValmError(
            f"this model takes {model.fusion_options.num_images} images a token, but has no retriever: give it a "
            "knowledge base (--kb)"
        )
    elif isinstance(finder, BlindRetriever):
        note = "This model is a query control (Blind): it reads each token's retrieval query instead of an image."
    found = _find(model, finder, ids)
    text_weights, image_weights = model.fusion_attention(ids, **model.finder.arguments(found))
    scores = found.scores
    if isinstance(finder, OtherImages):
        scores = finder.own_scores(ids, found)
    if answers is None:
        words, probabilities = _likeliest(tokenizer, _log_probs(model, ids, found)[-1])
    else:
        words, probabilities = list(answers), _probabilities(model, tokenizer, finder, ids, answers)
    return Explanation(
        text=text,
        tokens=tuple(_shown(tokenizer, id) for id in ids[0].tolist()),
        text_weights=text_weights[0].float().cpu().numpy(),
        image_weights=image_weights[0].float().cpu().numpy(),
        image_index=found.image_index[0].cpu().numpy(),
        scores=scores[0].float().cpu().numpy(),
        images=tuple(show_images(finder, found.image_ids.tolist())),
        answers=tuple(words),
        probabilities=np.array(probabilities, np.float32),
        note=note,
    )


class Reader(NamedTuple):
    """The arguments of `explain` that choose the model and its images."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    retriever: FindsImages | None = None
    with_images: bool = True


def explain_together(
    readers: Mapping[str, Reader], text: str, answers: Sequence[str] | None = None
) -> dict[str, Explanation]:
    """Explains `text` once for each reader, with the same answers in the same order.

    Args:
        readers: a `Reader` (model, tokenizer, retriever, with_images) by title.
        text: the prompt, as in `explain`.
        answers: by default, the 10 words that are likeliest for any reader, in the first reader's order.

    Returns:
        An `Explanation` by title, in the order of `readers`.

    Raises:
        ValmError: as in `explain`.

    Example:
        >>> from valm.explain.explanation import Reader, explain_together
        >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
        >>> readers = {"images": Reader(model, tokenizer), "text": Reader(model, tokenizer, with_images=False)}
        >>> explanations = explain_together(readers, "a picture of")
        >>> explanations["images"].answers == explanations["text"].answers
        True
    """
    explanations = {name: _explain(reader, text, answers) for name, reader in readers.items()}
    if answers is None and len(readers) > 1:
        largest: dict[str, float] = {}
        for explanation in explanations.values():
            for word, probability in zip(explanation.answers, explanation.probabilities.tolist(), strict=True):
                largest[word] = max(largest.get(word, 0.0), probability)
        likeliest = sorted(largest, key=lambda word: -largest[word])[:TOP_ANSWERS]
        explanations = {name: _explain(reader, text, likeliest) for name, reader in readers.items()}
        order = np.argsort(-next(iter(explanations.values())).probabilities, kind="stable")
        explanations = {name: _with_order(explanation, order) for name, explanation in explanations.items()}
    return explanations


def _with_order(explanation: Explanation, order: np.ndarray) -> Explanation:
    answers = tuple(explanation.answers[place] for place in order)
    return replace(explanation, answers=answers, probabilities=explanation.probabilities[order])


def _explain(reader: Reader, text: str, answers: Sequence[str] | None) -> Explanation:
    model, tokenizer, retriever, with_images = reader
    return explain(model, tokenizer, text, retriever=retriever, with_images=with_images, answers=answers)


def _token_ids(model: Any, tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token ids (1, T) int64, on the model's device."""
    if not text.strip():
        raise ValmError('the prompt is empty: give a text, such as "the color of the sky is"')
    ids = torch.tensor([prompt_ids(tokenizer, text)])
    _check_length(model, ids.shape[1], "the prompt")
    return ids.to(model.device)


def _check_length(model: Any, tokens: int, what: str) -> None:
    context = context_length(model)
    if tokens > min(context, MAX_TOKENS):
        limit = f"this model reads {context}" if context < MAX_TOKENS else f"an explanation shows {MAX_TOKENS}"
        raise ValmError(f"{what} is {tokens} tokens long, and {limit} at most: give a shorter prompt")


def _why_no_images(model: Any, with_images: bool) -> str:
    if model.fusion_options.num_images == 0:
        return "This model takes no images (K = 0): it reads only the text."
    return "" if with_images else "The images are switched off: the model reads only the text."


def _find(model: Any, retriever: FindsImages | None, ids: Tensor) -> Retrieved:
    """The images of each token; empty without a retriever."""
    if retriever is not None:
        return model.finder.seen(retriever(ids), ids.device)
    none = torch.empty(*ids.shape, 0, device=ids.device)
    pool = torch.empty(0, model.fusion_options.image_dim, device=ids.device)
    return Retrieved(pool, none.long(), torch.empty(0, dtype=torch.int64), none)


@torch.no_grad()
def _log_probs(model: Any, ids: Tensor, found: Retrieved) -> Tensor:
    """Log probabilities (T, V) float32 of the token after each token of `ids` (1, T)."""
    return model(ids, **model.finder.arguments(found)).logits[0].float().log_softmax(-1)


def _likeliest(tokenizer: PreTrainedTokenizerFast, log_probs: Tensor) -> tuple[list[str], list[float]]:
    """The likeliest words that are one token when written after a blank, and their probabilities; log_probs is (V,)."""
    values, ids = log_probs.topk(min(8 * TOP_ANSWERS, len(log_probs)))
    words, probabilities = [], []
    for value, id in zip(values.tolist(), ids.tolist(), strict=True):
        word = str(tokenizer.decode([id])).strip()
        if id not in tokenizer.all_special_ids and answer_tokens(tokenizer, [word]) == [[id]]:
            words.append(word)
            probabilities.append(float(np.exp(value)))
    return words[:TOP_ANSWERS], probabilities[:TOP_ANSWERS]


def _probabilities(
    model: Any, tokenizer: PreTrainedTokenizerFast, retriever: FindsImages | None, ids: Tensor, answers: Sequence[str]
) -> list[float]:
    """The probability of each answer, with all its tokens, as the continuation of `ids` (1, T)."""
    tokenized = answer_tokens(tokenizer, answers)
    check_writable(tokenizer, answers, tokenized)
    by_head: dict[tuple[int, ...], Tensor] = {}
    probabilities = []
    for answer in tokenized:
        head = tuple(answer[:-1])  # one-token answers share the pass over the prompt
        _check_length(model, ids.shape[1] + len(head), "the prompt followed by an answer")
        if head not in by_head:
            longer = torch.cat([ids, ids.new_tensor([head])], 1)
            by_head[head] = _log_probs(model, longer, _find(model, retriever, longer))[ids.shape[1] - 1 :]
        log_probs = by_head[head]  # (tokens of the answer, V)
        probabilities.append(float(log_probs[range(len(answer)), answer].sum().exp()))
    return probabilities


def _shown(tokenizer: PreTrainedTokenizerFast, id: int) -> str:
    """A token for display: without the blank before it, and never empty."""
    if id == begin_id(tokenizer):
        return "(start)"
    text = str(tokenizer.decode([id]))
    return text.strip() or repr(text)
