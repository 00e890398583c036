"""Runs a `TrainingPlan`: a training from beginning to end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from valm.clip.tokenizer import begin_id, clip_tokenizer, load_tokenizer, own_tokenizer
from valm.corpus.min_score import find_min_score
from valm.corpus.plan import RetrievalPlan
from valm.corpus.retrieved import CorpusRetrieval, tokenized
from valm.corpus.run import run_retrieval
from valm.corpus.texts import TextCorpus
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.augment import augment
from valm.model.checkpoint import load_decoder
from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import QUERY_SETTINGS
from valm.retrieval.retriever import BlindRetriever, Retriever
from valm.retrieval.source import ImageSource, open_encoder
from valm.store.files import output_folder
from valm.training.callbacks import Patience, ended_by_signals, show_progress
from valm.training.data import Documents, hold_out, twin, with_min_score
from valm.training.image_trainer import ImageTrainer
from valm.training.launch import launched_processes
from valm.training.mix import base_weights, mix
from valm.training.plan import TrainingPlan, validation_of
from valm.training.run_note import begun_checkpoint, content_of, note_numbers, note_run, only_training
from valm.training.train import trainer, training_arguments

# Tokens whose queries a blind model keeps from one epoch to the next.
CACHED_QUERIES = 1 << 17


def run_plan(plan: TrainingPlan, *, command: str | None = None) -> ImageTrainer:
    """Trains, and writes the model into `plan.out`. In a launched training all processes call it.

    Args:
        command: for the model card (`write_card`).

    Returns:
        The Trainer after the training.

    Raises:
        ValmError: fields do not go together, or with what `out` holds; something cannot be read or does not belong
            together; another process trains in `out`; or as in `ImageTrainer.train`.
        KeyboardInterrupt: Ctrl-C or SIGTERM has ended it, after a step, with a checkpoint.
    """
    plan.check()
    plan.check_paths()
    settings = training_arguments(plan.out, **plan.training_fields())
    with output_folder(plan.out) as out:
        return _run(plan, out, settings, command)


def _run(plan: TrainingPlan, out: Path, settings: TrainingArguments, command: str | None) -> ImageTrainer:
    checkpoint = begun_checkpoint(out, plan.resume, settings.should_save)
    kb = None if plan.kb is None else ImageKnowledgeBase.open(plan.kb)
    dataset, tokenizer = _open_corpus(plan)
    min_score = _min_score(plan, kb, dataset)
    documents, held_out = _split(plan, kb, dataset, tokenizer, min_score, settings.seed)
    torch.manual_seed(settings.seed)
    model = _model(plan, kb, dataset, tokenizer, min_score, settings.device)
    sees = model.fusion_options
    base = None if plan.base is None or (held_out is None and not plan.mix) else base_weights(model)
    training = trainer(
        model,
        documents,
        kb if sees.retrieves else None,  # a blind model makes its queries as it trains
        tokenizer=tokenizer,
        arguments=settings,
        eval_dataset=held_out,
        row_length=plan.context,
        cache_below=plan.cache_below,
        fusion_lr=plan.fusion_lr if sees.num_images > 0 else None,
        limit_softmax=plan.limit_softmax,
        image_dropout=plan.image_dropout if sees.num_images > 0 else 0.0,
        callbacks=[Patience(patience)] if (patience := plan.stops_after()) else None,
    )
    if base is not None and (training.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        if plan.mix != 0 and base:
            raise ValmError(
                "weights that FSDP or DeepSpeed's ZeRO-3 divide among the processes cannot be mixed: give --mix 0"
            )
        base = None
    in_file = plan.validation is not None and isinstance(validation_of(plan.validation), Path)
    noted = plan.noted() | {"validation_data": content_of(held_out) if in_file else None}
    note_run(out, training, dataset, noted | plan.training_fields())
    if settings.should_log:
        print(summary(plan, model, documents, training), file=sys.stderr)
    show_progress(training, "train")
    if plan.resume and settings.should_log:
        begins = "at step 0: there is no checkpoint" if checkpoint is None else f"from {Path(checkpoint).name}"
        print(f"the training in {out} goes on {begins}", file=sys.stderr)
    # saving a model locks the folder itself
    with only_training(out) if settings.should_save else nullcontext():
        with ended_by_signals(training):
            training.train(resume_from_checkpoint=checkpoint)
        if base is not None:
            training.numbers = mix(training, base, plan.mix)
            note_numbers(out, training)
        training.write(out, tokenizer, command=command)
    return training


def summary(plan: TrainingPlan, model: Any, documents: Any, training: ImageTrainer) -> str:
    """One line that says what is trained, and whether it sees images."""
    images = model.fusion_options.num_images
    of = "its own query as the image of a token" if plan.twin == "blind" else f"{images} images a token of {plan.kb}"
    sees = of if images else "text alone" + (" (there is no --kb)" if plan.kb is None else "")
    config = model.config.get_text_config(decoder=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "" if trained == count else f", of which {trained:,} train"
    rows = training.get_total_train_batch_size(training.args)
    steps = training.args.max_steps if training.args.max_steps > 0 else f"{training.args.num_train_epochs:g} epochs of"
    what = f"the {plan.twin} twin" if plan.twin else "a model"
    sizes = f"{config.num_hidden_layers} layers of width {config.hidden_size}, {count:,} parameters{share}"
    return f"training {what} with {sees}: {sizes}; {len(documents):,} documents, {steps} steps of {rows}"


def _min_score(plan: TrainingPlan, kb: ImageKnowledgeBase | None, dataset: Any) -> float | None:
    """The `min_score` of the documents, also of those of a twin that has images."""
    if kb is None or plan.min_score is None or plan.twin in ("text", "blind"):
        return None
    if not isinstance(plan.min_score, str):
        return plan.min_score
    settings = dict(dataset.query_settings)
    precision = getattr(torch, settings.pop("precision"))
    of_clip = {"clip": dataset.clip(plan.allow_download), "allow_download": plan.allow_download}
    with _retrieving():  # on the CPU, where all processes of a training choose the same, and int8 runs
        encoder = open_encoder(kb, tokenizer=dataset.tokenizer, dtype=precision, **of_clip, **settings)
    texts = {"questions": plan.questions, "ordinary_text": plan.ordinary_text}
    found = find_min_score(Retriever(encoder, kb, dataset.k), **texts)
    print(f"min_score {found:.4f}: below it a token sees no images", file=sys.stderr)
    return found


def _model(
    plan: TrainingPlan,
    kb: ImageKnowledgeBase | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerFast,
    min_score: float | None,
    device: torch.device,
) -> Any:
    """The model or its twin, before the training on `device`."""
    images: dict[str, Any] = {}
    if kb is not None and plan.twin != "text":
        blind = plan.twin == "blind"
        images = {"num_images": 1 if blind else dataset.k, "image_dim": kb.dim, "blind": blind}
        images["min_score"] = None if blind else min_score
    model = _new(plan, tokenizer, images) if plan.base is None else _augmented(plan, plan.base, images)
    if kb is not None and plan.twin == "blind":
        source = ImageSource.of_knowledge_base(kb, **dataset.query_settings)
        with _retrieving():
            of_clip = {"clip": dataset.clip(plan.allow_download), "allow_download": plan.allow_download}
            retriever = model.finder.open(source, dataset.tokenizer, device=device, **of_clip)
        model.set_retriever(BlindRetriever(retriever.encoder, CACHED_QUERIES))
    return model


def _new(plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast, images: dict[str, Any]) -> Any:
    """A VaLM with random weights, or without images GPT-2*."""
    size = plan.size()
    config = ValmConfig(
        vocab_size=len(tokenizer),
        n_positions=plan.context,
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        bos_token_id=begin_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        score_scale=plan.score_scale if images else None,
        **(images or {"num_images": 0, "image_dim": size.width}),
    )
    return VaLMForCausalLM(config)


def _augmented(plan: TrainingPlan, base: str, images: dict[str, Any]) -> Any:
    """The pretrained decoder `base`, augmented, or without images its text-only twin."""
    given = {"layer": plan.layer, "unfreeze": plan.unfreeze, "logit_bias": plan.logit_bias}
    said: Any = {name: value for name, value in given.items() if value is not None}
    if images:
        said["score_scale"] = plan.score_scale
    elif plan.unfreeze is None:
        raise ValmError("the text-only twin has no new parameters to train: give --unfreeze block or all")
    return augment(load_decoder(base), **(images or {"num_images": 0, "image_dim": 1}), **said)


def _split(
    plan: TrainingPlan,
    kb: ImageKnowledgeBase | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerFast,
    min_score: float | None,
    seed: int,
) -> tuple[Any, Any]:
    """The documents to train on and those of `validation`, or None, with the images of the twin.

    Raises:
        ValmError: the two do not belong together.
    """

    def with_images(documents: Any) -> Any:
        seen = documents if plan.twin in ("text", "blind") else with_min_score(documents, min_score)
        return seen if plan.twin is None or kb is None else twin(plan.twin, seen, len(kb), seed)

    if plan.validation is None:
        return with_images(dataset), None
    found = validation_of(plan.validation)
    if isinstance(found, float):
        return hold_out(with_images(dataset), found, seed)
    return with_images(dataset), with_images(_open_validation(plan, dataset, tokenizer, found))


def _open_validation(
    plan: TrainingPlan, dataset: Any, tokenizer: PreTrainedTokenizerFast, path: Path
) -> Documents | CorpusRetrieval:
    """The documents of `validation` that are in `path`.

    Raises:
        ValmError: they do not belong to `dataset`.
    """
    texts = TextCorpus([path], column=plan.corpus.column if plan.corpus is not None else "text")
    if not isinstance(dataset, CorpusRetrieval):
        if path.is_dir():
            raise ValmError(
                f"--validation {path} is a result of `valm retrieve`, and the corpus is none: give a text file"
            )
        return _read(texts, tokenizer)
    if plan.retrieval is not None and not path.is_dir():
        raise ValmError(f"the corpus was retrieved: retrieve --validation {path} too, or give a fraction to hold out")
    found = CorpusRetrieval.open(path) if path.is_dir() else _retrieve(plan, texts, "validation-retrieval")
    for name in ("tokenizer", "eos", "knowledge_base", "k", *QUERY_SETTINGS):
        here, there = (corpus.manifest["plan"].get(name) for corpus in (found, dataset))
        if here != there:
            raise ValmError(
                f"--validation {path} was retrieved otherwise than the corpus: its {name.replace('_', ' ')} is "
                f"{here}, not {there}"
            )
    return found


def _open_corpus(plan: TrainingPlan) -> tuple[Documents | CorpusRetrieval, PreTrainedTokenizerFast]:
    """The documents and the tokenizer of the model."""
    if plan.corpus is not None and plan.kb is None:
        new = clip_tokenizer() if plan.tokenizer is None else load_tokenizer(plan.tokenizer)
        tokenizer = new if plan.base is None else own_tokenizer(plan.base)
        return _read(plan.corpus, tokenizer), tokenizer
    if plan.corpus is not None:
        documents = _retrieve(plan, plan.corpus, "retrieval")
    else:
        assert plan.retrieval is not None  # as `check` found
        documents = CorpusRetrieval.open(plan.retrieval)
    if plan.base is not None:  # `trainer` compares the base's own with the corpus'
        return documents, own_tokenizer(plan.base)
    chats = documents.tokenizer.chat_template is not None  # which a model trained from nothing cannot
    return documents, load_tokenizer(documents.path) if chats else documents.tokenizer


def _read(corpus: TextCorpus, tokenizer: PreTrainedTokenizerFast) -> Documents:
    """The documents of a model of text alone."""
    found, groups = tokenized(list(corpus.documents()), tokenizer)
    return Documents([{"input_ids": document} for document in found], of_images=groups)


def _retrieve(plan: TrainingPlan, corpus: TextCorpus, name: str) -> CorpusRetrieval:
    if launched_processes() > 1:
        raise ValmError("several processes train on what one has retrieved: run `valm retrieve`, and give --retrieval")
    with _retrieving():
        return run_retrieval(_retrieval(plan, corpus, name))


def _retrieval(plan: TrainingPlan, corpus: TextCorpus, name: str) -> RetrievalPlan:
    """The retrieval of a corpus into a folder beside `out`, which is not published with the model."""
    assert plan.kb is not None
    out = Path(plan.out).absolute()
    given: Any = {"corpus": corpus, "kb": plan.kb, "tokenizer": plan.base, "allow_download": plan.allow_download}
    return RetrievalPlan(out=out.with_name(f"{out.name}-{name}"), **given)


@contextmanager
def _retrieving() -> Iterator[None]:
    """Says of an error that names an option of `valm retrieve` whose it is."""
    try:
        yield
    except ValmError as error:
        if not any(named in str(error) for named in ("(--clip)", "k must be", "cannot be int8")):
            raise
        raise ValmError(
            f"{error}; -k, --clip and --query-dtype are of `valm retrieve`, whose result --retrieval takes"
        ) from error
