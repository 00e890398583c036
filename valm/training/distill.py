"""Trains the query head of a model (`valm.model.query_head`) to ask for images as CLIP would.

The model itself stays as it is. The teacher is a `ContextEncoder`, and the loss of a token is the distance of the two
queries and, over the images that the corpus retrieved for the batch, how differently they rank::

    loss = (1 - cos(q, q_clip)) + KL(softmax(s V q_clip) || softmax(s V q))      s: CLIP's own logit scale

The second is a contrastive loss whose targets are CLIP's probabilities (Hinton et al. 2015): which images are found
depends on small differences between the nearest ones, which the cosine hardly sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import begin_id
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.gpt2 import VaLMForCausalLM
from valm.model.query_head import SelfEncoder, SelfRetriever
from valm.retrieval.context import ContextEncoder
from valm.training.blocks import Blocks
from valm.training.collate import Collator
from valm.training.split import hold_out
from valm.training.steps import Draws, take_steps

# Documents that are not trained on, for `Agreement`: a share, and at most so many. It is measured on as many of their
# blocks: a long document has several.
HELD_OUT = 0.05
MOST_HELD_OUT = 500


@dataclass(frozen=True)
class Agreement:
    """How well the head's queries agree with CLIP's, over tokens of documents that it was not trained on.

    Attributes:
        cosine: mean cosine of the two queries.
        overlap: mean share of a token's K images that the head finds too.
        tokens: how many tokens this is over.
    """

    cosine: float
    overlap: float
    tokens: int


def distill_queries(
    model: VaLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: CorpusRetrieval,
    kb: ImageKnowledgeBase,
    encoder: ContextEncoder,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int = 0,
    progress: bool = True,
) -> Agreement:
    """Gives `model` a new query head, trains it in place, and makes it find the model's images (`SelfRetriever`).

    The steps are those of `take_steps`. Nothing but the head is changed.

    Args:
        tokenizer: the model's.
        corpus: the images of the tokens to train on, retrieved from `kb` with the queries of `encoder`.
        batch_size: documents of a step, or blocks of a document longer than the model's context.
        seed: of the head's weights, the documents that are held out, and the order of the others.

    Raises:
        ValmError: the model cannot have a head; corpus, knowledge base, tokenizer and encoder do not belong together;
            the corpus has too few documents; or a loss is not finite.
    """
    if not isinstance(model, VaLMForCausalLM):
        raise ValmError(f"only a VaLMForCausalLM can have a query head, got a {type(model).__name__}")
    corpus.check_tokenizer(tokenizer)
    corpus.check_knowledge_base(kb)
    kb.check_encoder(encoder.clip)
    num_images = model.image_options.num_images
    if num_images > 0 and corpus.k != num_images:
        raise ValmError(f"{corpus.path} has {corpus.k} images a token, but the model's num_images is {num_images}")
    if corpus.query != encoder.query:
        raise ValmError(f"{corpus.path} was retrieved with {corpus.query!r} queries, not with {encoder.query!r} ones")
    if corpus.segments != encoder.segments:
        raise ValmError(f"{corpus.path} was retrieved with {corpus.segments}, and the encoder has {encoder.segments}")
    if model.image_options.min_score is not None:
        warnings.warn(
            f"the model's min_score, {model.image_options.min_score}, is of CLIP's queries: choose it anew for those "
            "of the head (--min-score auto, model.set_min_score)",
            stacklevel=2,
        )
    torch.manual_seed(seed)
    head = model.add_query_head(encoder.clip.weights_hash)
    retriever = SelfRetriever(SelfEncoder(model, tokenizer, kb), kb, model.image_options.num_images)
    model.set_retriever(retriever)
    parts = hold_out(corpus, min(HELD_OUT, MOST_HELD_OUT / len(corpus)), seed)
    trained, held_out = (Blocks(part, model.config.n_positions, begin_id(tokenizer)) for part in parts)
    collate = Collator(tokenizer, kb)
    scale = encoder.clip.model.logit_scale.exp().item()
    model.eval()

    def losses() -> Iterator[Tensor]:
        for draws in Draws(len(trained), min(batch_size, len(trained)), seed):
            batch = _on(model.device, collate([trained[number] for _, number in draws]))
            queries, expected = _queries(model, encoder, batch)
            yield query_loss(queries, expected, batch["image_pool"].float(), scale)

    name = "distill" if progress else None
    take_steps(head.parameters(), losses(), steps=steps, lr=lr, weight_decay=0.01, progress=name)
    head.requires_grad_(False)
    return _agreement(model, encoder, retriever, held_out, collate, batch_size)


def query_loss(queries: Tensor, expected: Tensor, images: Tensor, scale: float) -> Tensor:
    """The loss of `queries` (n, E) against CLIP's (n, E), both normalised, over `images` (U, E)."""
    cosine = (queries * expected).sum(-1)  # (n,)
    found = F.log_softmax(scale * queries @ images.T, dim=-1)  # (n, U)
    wanted = F.log_softmax(scale * expected @ images.T, dim=-1)
    return (1 - cosine).mean() + F.kl_div(found, wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def _agreement(
    model: VaLMForCausalLM,
    encoder: ContextEncoder,
    retriever: SelfRetriever,
    blocks: Blocks,
    collate: Collator,
    batch_size: int,
) -> Agreement:
    cosine, overlap, tokens = 0.0, 0.0, 0
    count = min(len(blocks), MOST_HELD_OUT)
    for start in range(0, count, batch_size):
        chosen = [blocks[number] for number in range(start, min(start + batch_size, count))]
        batch = _on(model.device, collate(chosen))
        queries, expected = _queries(model, encoder, batch)
        ids, _ = retriever.nearest(queries)  # (n, K)
        # in the order of the queries, row by row, without the first token
        stored = torch.from_numpy(np.concatenate([block["image_ids"][1:] for block in chosen]))
        wanted = stored.masked_fill(stored == -1, -2).to(ids.device)
        cosine += float((queries * expected).sum())
        overlap += float((wanted[:, :, None] == ids[:, None, :]).any(-1).float().mean(-1).sum())
        tokens += len(ids)
    return Agreement(cosine / tokens, overlap / tokens, tokens)


def _queries(model: VaLMForCausalLM, encoder: ContextEncoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The head's and CLIP's queries of the n tokens of a batch behind the first of each row, (n, E) each."""
    behind = batch["attention_mask"][:, 1:].bool()
    arguments = batch["input_ids"], batch["attention_mask"]
    return model.self_queries(*arguments)[:, 1:][behind], encoder(*arguments)[:, 1:][behind]


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
