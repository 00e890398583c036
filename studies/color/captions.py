"""Captions in context: the captions of the images that a text retrieves, placed before the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from studies.color.pictures import Picture
from valm.clip.tokenizer import batches_by_length, padded, prompt_ids
from valm.evaluation.questions import Questions
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.retriever import Retriever

# Tokens in one call of a retriever.
BATCH_TOKENS = 4096


class Captions:
    """The caption of each image of a knowledge base, with the colour of its pixels before the object's name."""

    def __init__(self, kb: ImageKnowledgeBase, pictures: Sequence[Picture]):
        self.kb = kb
        self._pictures = {picture.file: picture for picture in pictures}

    def __call__(self, image: int) -> str:
        picture = self._pictures[self.kb.item(image).uri]
        caption = picture.caption.split("\n")[0]
        return caption if picture.color is None else f"{picture.color} {caption}"


def captions_line(captions: Iterable[str]) -> str:
    """The line of captions before a question or a document."""
    return f"Here are pictures of {', '.join(captions)}.\n"


def last_images(texts: Sequence[str], retriever: Retriever) -> Tensor:
    """Ids (n, K) of the images of each text's last token, which precedes the answer to a question."""
    rows = [prompt_ids(retriever.encoder.tokenizer, text) for text in texts]
    ids = torch.full((len(rows), retriever.k), -1)
    for batch in batches_by_length(list(map(len, rows)), BATCH_TOKENS):
        found, _ = retriever.find(*padded([rows[number] for number in batch]))  # (B, T, K)
        last = [len(rows[number]) - 1 for number in batch]
        ids[batch] = found[range(len(batch)), last].cpu()
    return ids


def captioned(asked: Questions, retriever: Retriever, caption: Captions) -> Questions:
    """`asked`, with the captions of the images of each question's last token before the question."""
    flat = [text for row in asked.texts for text in row]
    found = last_images(flat, retriever)
    lines = [captions_line(caption(image) for image in images if image >= 0) for images in found.tolist()]
    texts = iter(line + text for line, text in zip(lines, flat, strict=True))
    return dataclasses.replace(asked, texts=tuple(tuple(next(texts) for _ in row) for row in asked.texts))
