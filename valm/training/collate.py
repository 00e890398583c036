"""From documents to batches: padded or packed rows, with every picture of the batch held once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from valm.corpus.retrieved import NO_IMAGE
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.tokenizer import begin_id
from valm.training.cache_below import FUSION_INPUT, fusion_input

# What PyTorch's cross entropy leaves out.
IGNORED = -100


class Collator:
    """Turns a list of documents into the arguments of `VaLMForCausalLM.forward`.

    A document is a dict with `input_ids` (T,) and, where pictures were retrieved, `image_ids` (T, K): ids in the
    knowledge base, NO_IMAGE in empty slots. The batch has

    - input_ids, attention_mask, labels (B, L) int64; labels leave out padding and bos, which nobody could foresee (of
      a bos that is eos too, as GPT-2's, only where it begins a document);
    - with a knowledge base: image_pool (U, E) float16, the vectors of the pictures in this batch, each once, and
      image_index (B, L, K) int64 into it, -1 = none;
    - of documents with hidden states (see `cache_below`), fusion_input (B, L, C).

    kb: where the vectors are; None for a model that sees no pictures, or that finds them itself (`set_retriever`).
    row_length: None gives each document a row of its own, as long as the longest. A number puts as many documents
        as fit, in their order, into rows of at most that length: the model keeps documents apart at each SOT.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, kb: ImageKnowledgeBase | None, row_length: int | None = None
    ):
        self.vocabulary = len(tokenizer)
        self.bos = begin_id(tokenizer)
        self.bos_ends = self.bos == tokenizer.eos_token_id
        # nothing looks at padding, so any token will do
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.kb = kb
        self.row_length = row_length

    def __call__(self, documents: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ValmError for a document without image_ids where there is a knowledge base, a picture not in it, a
        token that the tokenizer does not have, and a document to be packed that does not begin with bos."""
        if self.row_length is not None and any(document["input_ids"][0] != self.bos for document in documents):
            raise ValmError("a document does not begin with bos: packed, it would be read on from the one before it")
        places, shape = self._places([len(document["input_ids"]) for document in documents])
        ids = np.full(shape, self.pad, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for document, place in zip(documents, places, strict=True):
            ids[place] = document["input_ids"]
            mask[place] = 1
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ValmError(
                f"the documents have token ids from {ids.min()} to {ids.max()}, the tokenizer only {self.vocabulary}; "
                "tokenize or retrieve them again"
            )
        labels = np.where((mask == 1) & (self.bos_ends | (ids != self.bos)), ids, IGNORED)
        for row, columns in places:
            labels[row, columns.start] = IGNORED
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.kb is not None:
            batch |= self._images(self.kb, documents, places, shape)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if FUSION_INPUT in documents[0]:
            states = [document[FUSION_INPUT] for document in documents]
            tensors[FUSION_INPUT] = fusion_input(states, places, shape)
        return tensors

    def _places(self, lengths: list[int]) -> tuple[list[tuple[int, slice]], tuple[int, int]]:
        """Where each document goes, (row, columns), and the shape of the batch."""
        limit = self.row_length or 0
        row, end, width, places = -1, 0, 0, []
        for length in lengths:
            if row < 0 or end + length > limit:
                row, end = row + 1, 0
            places.append((row, slice(end, end + length)))
            end += length
            width = max(width, end)
        return places, (row + 1, width)

    @staticmethod
    def _images(
        kb: ImageKnowledgeBase, documents: list[dict[str, Any]], places: list[tuple[int, slice]], shape: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        if any("image_ids" not in document for document in documents):
            raise ValmError(
                "the documents have no image_ids: retrieve them first, or train without a knowledge base; a Trainer "
                "that is not made by valm.training.trainer removes them unless it has remove_unused_columns=False"
            )
        slots = np.full((*shape, documents[0]["image_ids"].shape[1]), NO_IMAGE, dtype=np.uint32)  # (B, L, K)
        for document, place in zip(documents, places, strict=True):
            slots[place] = document["image_ids"]
        images, index = np.unique(slots, return_inverse=True)  # ascending, so NO_IMAGE comes last
        index = index.reshape(slots.shape).astype(np.int64)
        if images[-1] == NO_IMAGE:
            images = images[:-1]
            index[index == len(images)] = -1
        try:
            return {"image_pool": kb.gather(images.astype(np.int64)), "image_index": index}
        except IndexError as error:
            raise ValmError(f"the documents' image_ids belong to another knowledge base: {error}") from error
