"""Collates documents into batches of padded or packed rows that contain each image once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import begin_id
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.training.cache_below import FUSION_INPUT, fusion_input
from valm.training.data import Places, at_places

# The label that PyTorch's cross entropy ignores.
IGNORED = -100


class Collator:
    """Turns a list of documents into the arguments of a model with images, or of any decoder of transformers.

    A document is a dict with `input_ids` (T,). If images were retrieved, it also contains `image_ids` (T, K), ids in
    the knowledge base, -1 = no image. The batch contains

    - input_ids, labels (B, L) int64; labels ignore padding and bos (if bos is also eos, only the bos that opens a
      document);
    - in packed rows, position_ids (B, L) int64, which restart at each document; each token of padding is a separate
      document. In padded rows, padding is on the right, where no token sees it;
    - with a knowledge base, image_pool (U, E) float16, the vectors of the images in this batch, each once, and
      image_index (B, L, K) int64, rows of the pool, -1 = no image;
    - for documents with hidden states (see `cache_below`), fusion_input (B, L, C).

    Args:
        kb: contains the vectors; None for a model without images or with a retriever (`set_retriever`).
        row_length: None puts each document into its own row, padded to the longest. A number packs as many documents
            as fit, in order, into rows of at most that length, for a model that keeps them apart by their positions
            (`valm.model.probe.keeps_apart`).
        mask: also attention_mask (B, L) int64, 0 at padding, which a retriever needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        kb: ImageKnowledgeBase | None,
        row_length: int | None = None,
        *,
        mask: bool = False,
    ):
        self.vocabulary = len(tokenizer)
        self.bos = begin_id(tokenizer)
        self.bos_ends = self.bos == tokenizer.eos_token_id
        # padding is never read, so any token works
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.kb = kb
        self.row_length = row_length
        self.mask = mask

    def __call__(self, documents: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of `documents`.

        Raises:
            ValmError: with a knowledge base, a document lacks image_ids or has an image that is not in it; or a token
                is not in the tokenizer.
        """
        lengths = [len(document["input_ids"]) for document in documents]
        places, shape = self._places(lengths)
        ids = at_places([document["input_ids"] for document in documents], places, shape, self.pad, np.int64)
        positions = at_places([np.arange(length) for length in lengths], places, shape, -1)  # -1 at padding
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ValmError(
                f"the documents contain token ids from {ids.min()} to {ids.max()}, but the tokenizer has only "
                f"{self.vocabulary} tokens: tokenize or retrieve the documents again"
            )
        learned = (positions > 0) & (self.bos_ends | (ids != self.bos))
        batch = {"input_ids": ids, "labels": np.where(learned, ids, IGNORED)}
        if self.row_length is not None:
            batch["position_ids"] = positions.clip(0)
        if self.mask:
            batch["attention_mask"] = (positions >= 0).astype(np.int64)
        if self.kb is not None:
            batch |= self._images(self.kb, documents, places, shape)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if FUSION_INPUT in documents[0]:
            states = [document[FUSION_INPUT] for document in documents]
            tensors[FUSION_INPUT] = fusion_input(states, places, shape)
        return tensors

    def _places(self, lengths: list[int]) -> tuple[Places, tuple[int, int]]:
        """The place of each document, (row, columns), and the shape of the batch."""
        limit = self.row_length or 0
        row, end, width = -1, 0, 0
        places: Places = []
        for length in lengths:
            if row < 0 or end + length > limit:
                row, end = row + 1, 0
            places.append((row, slice(end, end + length)))
            end += length
            width = max(width, end)
        return places, (row + 1, width)

    def _images(
        self, kb: ImageKnowledgeBase, documents: list[dict[str, Any]], places: Places, shape: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        if any("image_ids" not in document for document in documents):
            raise ValmError(
                "the documents contain no image_ids: retrieve them first, or train without a knowledge base. A Trainer "
                "that valm.training.trainer did not make removes them unless remove_unused_columns=False is set"
            )
        found_ids = [document["image_ids"] for document in documents]
        image_ids = at_places(found_ids, places, shape, -1, np.int64)  # (B, L, K)
        images, index = np.unique(image_ids, return_inverse=True)
        index = index.reshape(image_ids.shape)
        if images[0] == -1:  # ascending, so "none" comes first
            images, index = images[1:], index - 1
        try:
            return {"image_pool": kb.gather(images), "image_index": index}
        except IndexError as error:
            raise ValmError(f"the documents' image_ids belong to another knowledge base: {error}") from error
