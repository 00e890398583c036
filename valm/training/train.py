"""Training with transformers' Trainer."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments

from valm.clip.tokenizer import begin_id
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import check_vocabulary, positions, with_length
from valm.model.image_model import ImageModel
from valm.model.probe import keeps_apart
from valm.retrieval.source import RetrievalSource
from valm.training.base_divergence import stay_near_base
from valm.training.cache_below import start_from_cache
from valm.training.collate import Collator
from valm.training.data import blocks, evened, views, with_min_score
from valm.training.image_trainer import ImageTrainer
from valm.training.launch import check_processes
from valm.training.limited_softmax import limit_softmax
from valm.training.next_token_loss import NextTokenLoss, has_next_token_loss

log = logging.getLogger(__name__)

# What a training can do besides descending the loss of the next token, by the names of the options, in the order in
# which the methods apply: each loss contains those before it.
METHODS: dict[str, Callable[[ImageTrainer, Any, Any], None]] = {
    "cache_below": start_from_cache,
    "base_kl": stay_near_base,
    "limit_softmax": limit_softmax,
}
# Defaults of `training_arguments`. AdamW and clipping as in Wang et al. 2022, who used the schedule inverse_sqrt.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 2.0,
    "seed": 0,
}


def training_arguments(output_dir: str | os.PathLike, **fields: Any) -> TrainingArguments:
    """`TrainingArguments` with `DEFAULTS` for fields that are not given; use_cpu is set if torch finds no GPU. Raises
    ValmError if a field does not exist, transformers rejects a value, or launched processes would not train
    together."""
    # without use_cpu, several processes on CPUs would each train by itself
    own: dict[str, Any] = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    if str(fields.get("metric_for_best_model")).endswith("perplexity"):
        own["greater_is_better"] = False  # transformers assumes that only for losses
    try:
        arguments = TrainingArguments(output_dir=os.fspath(output_dir), **(DEFAULTS | own | fields))
    except (ImportError, TypeError, ValueError) as error:
        raise ValmError(f"the training arguments do not fit: {error}") from error
    check_processes(arguments)
    return arguments


def trainer(
    model: Any,
    dataset: Any,
    kb: ImageKnowledgeBase | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast,
    arguments: TrainingArguments,
    eval_dataset: Any = None,
    row_length: int | None = None,
    **options: Any,
) -> ImageTrainer:
    """Makes a transformers `Trainer` for a model that takes images. You may change it before you call `train()`.

    Precision, accumulation, schedules, logs, checkpoints and several processes work as in the Trainer. The loss is the
    mean over all tokens of a step, in any batch and process. A copy of `arguments` is adapted to the data: columns are
    not removed, each process makes batches from its own documents, and the logs show losses that are not finite.
    METHODS change the model itself: load it again for a training without them.

    Args:
        model: a `VaLMForCausalLM`, what `valm.augment` returned, or a decoder of transformers that sees no images.
        dataset: documents as `Collator` takes them, such as a `CorpusRetrieval`. Documents longer than the model's
            context, or than row_length, are cut (see `blocks`). Tokens below the model's `min_score` see no images.
        kb: the knowledge base with the vectors of the documents' images. None for a model without images (image_ids are
            then ignored) and for a model with a retriever.
        tokenizer: the tokenizer of model and documents.
        arguments: the Trainer's arguments; `training_arguments` makes them with the paper's optimizer.
            per_device_train_batch_size counts documents or, if they are cut, blocks.
        eval_dataset: documents to evaluate on, as in `dataset`: loss and perplexity over all their tokens. Documents
            given to the Trainer's `evaluate` and `predict` are treated likewise.
        row_length: pack documents into rows of this length (see `Collator`); None pads. If the model does not keep
            documents apart (`valm.model.probe.keeps_apart`) or retrieves while it trains, rows are padded, with a
            warning.
        options: METHODS, with the values of `TrainingPlan`, which also explains them: `cache_below`, `base_kl` and
            `limit_softmax`. Evaluation is without base_kl, and over the whole vocabulary. Besides, more of the
            Trainer's arguments: callbacks, optimizers, compute_metrics, ...

    Returns:
        The Trainer; its `write` saves the model with a card.

    Raises:
        ValmError: model, data and knowledge base do not fit together, or launched processes would not train together.

    Example:
        >>> from valm.training import trainer, training_arguments
        >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
        >>> documents = [tokenizer("a picture of a picture")] * 4
        >>> arguments = training_arguments("trained", max_steps=2, report_to="none")
        >>> training = trainer(model, documents, tokenizer=tokenizer, arguments=arguments)
        >>> training.train().global_step
        {'train_runtime': ...}
        2
    """
    check_processes(arguments)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # unwraps a PEFT model
    sees: Any = getattr(inner, "fusion_options", None)
    retrieves = kb is None and sees is not None and sees.num_images > 0
    ready = partial(_ready, inner, kb, tokenizer, arguments, row_length)
    documents, evaluated = ready(dataset), None if eval_dataset is None else ready(eval_dataset)
    if arguments.label_smoothing_factor:
        options.setdefault("compute_loss_func", NextTokenLoss(arguments.label_smoothing_factor))
    elif options.get("compute_loss_func") is None and not has_next_token_loss(inner):
        raise ValmError(
            f"{type(inner).__name__} does not compute the loss of the next token: use another decoder, or give "
            "compute_loss_func=valm.training.next_token_loss.NextTokenLoss()"
        )
    corpus = _retrieval(dataset)
    if kb is not None and corpus is not None:  # for models saved from now on
        inner.finder.set_source(RetrievalSource.of_knowledge_base(kb, **corpus.query_settings))
    row_length = _row_length(inner, row_length, retrieves)
    chosen = {name: options.pop(name, None) for name in METHODS}
    training = ImageTrainer(
        model=model,
        args=_changed(arguments, packed=row_length is not None),
        train_dataset=documents,
        eval_dataset=evaluated,
        prepared=lambda documents: _even(ready(documents), training.args),
        data_collator=Collator(tokenizer, kb, row_length, mask=retrieves),
        processing_class=with_length(tokenizer, inner),
        **options,
    )
    for name, method in METHODS.items():
        if chosen[name]:
            method(training, inner, chosen[name])
    training.eval_dataset = _even(training.eval_dataset, training.args)
    return training


def _ready(
    model: Any,
    kb: ImageKnowledgeBase | None,
    tokenizer: PreTrainedTokenizerFast,
    arguments: TrainingArguments,
    row_length: int | None,
    documents: Any,
) -> Any:
    """`documents` as the model reads them."""
    _check(model, documents, kb, tokenizer)
    if (retrieved := _retrieval(documents)) is not None:
        with arguments.main_process_first(desc="verify"):
            if arguments.local_process_index == 0:
                retrieved.verify_once()
    if kb is not None:
        documents = with_min_score(documents, model.fusion_options.min_score)
    limit = min((length for length in (positions(model), row_length) if length), default=None)
    if limit is None or not hasattr(documents, "__len__"):
        return documents
    return blocks(documents, limit, begin_id(tokenizer))


def _row_length(model: Any, row_length: int | None, retrieves: bool) -> int | None:
    """The length of packed rows; None, with a warning, if the model cannot read them."""
    if row_length is None or not (retrieves or not _tells_apart(model)):
        return row_length
    why = "retrieves while it trains" if retrieves else "does not keep documents apart by their positions"
    log.warning(f"this {type(model).__name__} {why}: each document gets its own row")
    return None


def _changed(arguments: TrainingArguments, *, packed: bool) -> TrainingArguments:
    """A copy of the arguments, adapted to the data."""
    changed: Any = copy.copy(arguments)
    if packed:
        changed.use_cache = False  # with a cache, transformers does not keep documents apart
    changed.remove_unused_columns = False  # the collator needs columns that are no arguments of the model
    changed.logging_nan_inf_filter = False
    changed.accelerator_config = copy.copy(changed.accelerator_config)
    changed.accelerator_config.dispatch_batches = False  # it splits by rows, which image_pool does not have
    changed.accelerator_config.split_batches = False
    changed._n_gpu = min(1, arguments.n_gpu)  # several GPUs in one process would split it too
    return changed


def _even(documents: Any, arguments: TrainingArguments) -> Any:
    """Documents that all processes evaluate together."""
    multiple = arguments.eval_batch_size * arguments.world_size
    return documents if documents is None or arguments.world_size == 1 else evened(documents, multiple)


def _retrieval(dataset: Any) -> CorpusRetrieval | None:
    """The retrieved corpus that `dataset` is a view of."""
    return next((view for view in views(dataset) if isinstance(view, CorpusRetrieval)), None)


def _tells_apart(model: Any) -> bool:
    """Whether the model keeps documents in a row apart by their positions."""
    if isinstance(model, ImageModel):
        return model.finder.tells_apart(model.base_model)
    return keeps_apart(model, model.base_model.forward)


def _check(model: Any, dataset: Any, kb: ImageKnowledgeBase | None, tokenizer: PreTrainedTokenizerFast) -> None:
    num_images = model.fusion_options.num_images if isinstance(model, ImageModel) else 0
    sized = hasattr(dataset, "__len__")
    if sized and len(dataset) == 0:
        raise ValmError("there are no documents to train on: the corpus contains no text")
    check_vocabulary(model, tokenizer)
    if kb is not None and num_images == 0:
        raise ValmError("a model with num_images = 0 (GPT-2*) sees no images: train it without a knowledge base")
    corpus = _retrieval(dataset)
    if corpus is not None:
        corpus.check_tokenizer(tokenizer)
    if kb is None:
        if num_images > 0 and model.retriever is None:
            raise ValmError(f"this model sees {num_images} images a token: give a knowledge base or a retriever")
        return
    options = model.fusion_options
    if kb.dim != options.image_dim:
        raise ValmError(
            f"the knowledge base contains vectors of dimension {kb.dim}, but the model's image_dim is "
            f"{options.image_dim}: use the knowledge base that the model was made for"
        )
    if corpus is not None:
        corpus.check_knowledge_base(kb)
    found = dataset[0].get("image_ids") if sized else None
    if found is not None and found.shape[1] != num_images:
        raise ValmError(
            f"the documents have {found.shape[1]} images a token, but the model's num_images is {num_images}: retrieve "
            "them again, or set num_images"
        )
