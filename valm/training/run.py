"""Runs a `TrainingPlan` from beginning to end."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainingArguments

from valm.clip.tokenizer import begin_id, clip_tokenizer, load_tokenizer, own_tokenizer
from valm.corpus.min_score import FEWEST, captions_of, find_min_score
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
from valm.retrieval.source import RetrievalSource, open_encoder
from valm.store.files import writable_folder
from valm.training.callbacks import ended_by_signals, show_progress
from valm.training.data import DocumentView, hold_out, twin, with_min_score
from valm.training.image_trainer import ImageTrainer
from valm.training.launch import launched_processes
from valm.training.plan import BASE_LOGIT_BIAS, NO_MIN_SCORE, TrainingPlan, validation_of
from valm.training.run_note import begun_checkpoint, note_numbers, note_run, only_training
from valm.training.train import trainer, training_arguments

# Tokens whose queries a blind model caches from epoch to epoch.
CACHED_QUERIES = 1 << 17


def run_plan(plan: TrainingPlan, *, command: str | None = None) -> ImageTrainer:
    """Trains a model and writes it to `plan.out`. In a launched training, all processes call it.

    Args:
        plan: describes the training.
        command: command for the model card.

    Returns:
        The Trainer after the training.

    Raises:
        ValmError: fields contradict each other or the content of `out`; data, knowledge base and model do not belong
            together; another process trains in `out`; or as in `ImageTrainer.train`.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended the training after a step, with a checkpoint.

    Example:
        >>> from valm.corpus.texts import TextCorpus
        >>> from valm.training import TrainingPlan, run_plan
        >>> corpus = TextCorpus(["corpus.txt"])
        >>> plan = TrainingPlan(corpus=corpus, tokenizer="base", model="2x32x4", context=32, steps=2, out="trained")
        >>> run_plan(plan).state.global_step
        2
    """
    plan.check()
    plan.check_paths()
    settings = training_arguments(plan.out, **plan.training_fields())
    return _run(plan, writable_folder(plan.out), settings, command)


def _run(plan: TrainingPlan, out: Path, settings: TrainingArguments, command: str | None) -> ImageTrainer:
    checkpoint = begun_checkpoint(out, plan.resume, settings.should_save)
    data = _open(plan, settings.seed)
    torch.manual_seed(settings.seed)
    model = _model(plan, data, settings.device)
    sees = model.fusion_options
    training = trainer(
        model,
        data.documents,
        data.kb if sees.retrieves else None,  # a blind model computes its queries while it trains
        tokenizer=data.tokenizer,
        arguments=settings,
        eval_dataset=data.held_out,
        row_length=plan.context,
        **plan.methods(),
        callbacks=[EarlyStoppingCallback(patience)] if (patience := plan.stops_after()) else None,
    )
    note_run(out, plan, training, data.corpus, data.held_out)
    if settings.should_log:
        print(summary(plan, model, data.documents, training), file=sys.stderr)
        if plan.resume:
            begins = "at step 0: there is no checkpoint" if checkpoint is None else f"from {Path(checkpoint).name}"
            print(f"the training in {out} resumes {begins}", file=sys.stderr)
    show_progress(training, "train")
    # saving a model locks the folder itself
    with only_training(out) if settings.should_save else nullcontext():
        with ended_by_signals(training):
            training.train(resume_from_checkpoint=checkpoint)
        if plan.base is not None and data.held_out is not None:
            training.numbers = {"eval_perplexity_base": training.perplexity_without_images()}
            note_numbers(out, training)
        training.write(out, data.tokenizer, command=command)
    return training


def summary(plan: TrainingPlan, model: Any, documents: Any, training: ImageTrainer) -> str:
    """A line that says what is trained, and whether it sees images."""
    images = model.fusion_options.num_images
    of = "its query as the image of a token" if plan.twin == "blind" else f"{images} images a token of {plan.kb}"
    sees = of if images else "text only"
    count, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    data = f"{len(documents):,} documents, {training.get_total_train_batch_size(training.args)} a step"
    what = "a model" if plan.twin is None else f"the {plan.twin} control"
    return f"training {what} with {sees}: {trained:,} of {count:,} parameters; {data}"


class Data(NamedTuple):
    """The inputs of a training.

    Attributes:
        corpus: all documents.
        min_score: score threshold of the documents, also for controls with images.
        documents, held_out: the documents to train on and to evaluate on, with the control's images.
    """

    kb: ImageKnowledgeBase | None
    corpus: Any
    tokenizer: PreTrainedTokenizerFast
    min_score: float | None
    documents: Any
    held_out: Any


def _open(plan: TrainingPlan, seed: int) -> Data:
    """Opens or retrieves the inputs of a training. Raises ValmError if the inputs do not belong together."""
    kb = None if plan.kb is None else ImageKnowledgeBase.open(plan.kb)
    corpus, tokenizer = _open_corpus(plan)
    min_score = None if kb is None or plan.twin == "text" else _min_score(plan, kb, corpus)

    def with_images(documents: Any) -> Any:
        seen = with_min_score(documents, min_score)
        return seen if plan.twin is None or kb is None else twin(plan.twin, seen, len(kb), seed)

    documents, held_out = with_images(corpus), None
    if plan.validation is not None:
        found = validation_of(plan.validation)
        if isinstance(found, float):
            documents, held_out = hold_out(documents, found, seed)
        else:
            held_out = with_images(_open_validation(plan, corpus, tokenizer, found))
    return Data(kb, corpus, tokenizer, min_score, documents, held_out)


def _min_score(plan: TrainingPlan, kb: ImageKnowledgeBase, corpus: Any) -> float | None:
    """The score threshold, also of the controls with images."""
    if isinstance(plan.min_score, float | int):
        return None if plan.min_score == NO_MIN_SCORE else plan.min_score
    if plan.min_score is None and plan.base is None:
        return None
    if plan.min_score is None and (reason := _why_no_threshold(plan, kb, corpus)):
        print(
            f"{reason}, so there is no score threshold: every token but a document's first sees images", file=sys.stderr
        )
        return None
    settings = dict(corpus.query_settings)
    precision = getattr(torch, settings.pop("precision"))
    of_clip = {"clip": corpus.clip(plan.allow_download), "allow_download": plan.allow_download}
    # on the CPU, where int8 runs and all processes of a training find the same threshold
    encoder = open_encoder(kb, tokenizer=corpus.tokenizer, dtype=precision, **of_clip, **settings)
    texts = {"questions": plan.questions, "ordinary_text": plan.ordinary_text}
    found = find_min_score(Retriever(encoder, kb, corpus.k), **texts)
    print(f"min_score {found:.4f}: below it a token sees no images", file=sys.stderr)
    return found


def _why_no_threshold(plan: TrainingPlan, kb: ImageKnowledgeBase, corpus: CorpusRetrieval) -> str | None:
    """Why the default threshold with a base cannot be chosen, or None if it can."""
    if not corpus.has_scores:
        return f"the retrieval {corpus.path} contains no scores"
    if plan.questions is None and plan.ordinary_text is None and len(captions_of(kb)) < FEWEST:
        return f"the knowledge base {kb.path} has fewer than {FEWEST} captions, and there is no --questions file"
    return None


def _model(plan: TrainingPlan, data: Data, device: torch.device) -> Any:
    """The model or control before the training on `device`: a VaLM with random weights, without images the text-only
    baseline, or an augmented decoder."""
    kb, blind = data.kb, plan.twin == "blind"
    images: dict[str, Any] = {}
    if kb is not None and plan.twin != "text":
        images = {"num_images": 1 if blind else data.corpus.k, "image_dim": kb.dim, "blind": blind}
        images["min_score"] = data.min_score
    if plan.base is None:
        layers, width, heads = plan.size()
        config = ValmConfig(
            vocab_size=len(data.tokenizer),
            n_positions=plan.context,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            bos_token_id=begin_id(data.tokenizer),
            eos_token_id=data.tokenizer.eos_token_id,
            pad_token_id=data.tokenizer.pad_token_id,
            **(images or {"num_images": 0, "image_dim": width}),
        )
        model: Any = VaLMForCausalLM(config)
    else:
        logit_bias = BASE_LOGIT_BIAS if plan.logit_bias is None else plan.logit_bias
        model = augment(load_decoder(plan.base), **images, layer=plan.layer, logit_bias=logit_bias)
    if kb is not None and blind:
        source = RetrievalSource.of_knowledge_base(kb, **data.corpus.query_settings)
        of_clip = {"clip": data.corpus.clip(plan.allow_download), "allow_download": plan.allow_download}
        retriever = model.finder.open(source, data.corpus.tokenizer, device=device, **of_clip)
        scored = None if data.min_score is None else kb
        model.set_retriever(BlindRetriever(retriever.encoder, CACHED_QUERIES, scored))
    return model


def _open_validation(
    plan: TrainingPlan, dataset: Any, tokenizer: PreTrainedTokenizerFast, path: Path
) -> DocumentView | CorpusRetrieval:
    """The documents of `validation` in `path`. Raises ValmError if the documents do not belong to `dataset`."""
    texts = TextCorpus([path], column=plan.corpus.column if plan.corpus is not None else "text")
    if not isinstance(dataset, CorpusRetrieval):
        if path.is_dir():
            raise ValmError(
                f"--validation {path} is a result of `valm retrieve`, but the corpus is not: give a text file"
            )
        return _read(texts, tokenizer)
    if plan.retrieval is not None and not path.is_dir():
        raise ValmError(f"the corpus was retrieved: retrieve --validation {path} too, or give a fraction to hold out")
    found = CorpusRetrieval.open(path) if path.is_dir() else _retrieve(plan, texts, "validation-retrieval")
    for name in ("tokenizer", "eos", "knowledge_base", "k", *QUERY_SETTINGS):
        here, there = (corpus.manifest["plan"].get(name) for corpus in (found, dataset))
        if here != there:
            raise ValmError(
                f"--validation {path} was not retrieved like the corpus: its {name.replace('_', ' ')} is {here}, "
                f"not {there}; retrieve it again"
            )
    return found


def _open_corpus(plan: TrainingPlan) -> tuple[DocumentView | CorpusRetrieval, PreTrainedTokenizerFast]:
    """The documents and the tokenizer of the model."""
    if plan.corpus is not None and plan.kb is None:
        tokenizer = clip_tokenizer() if plan.tokenizer is None else load_tokenizer(plan.tokenizer)
        return _read(plan.corpus, tokenizer), tokenizer
    if plan.corpus is not None:
        documents = _retrieve(plan, plan.corpus, "retrieval")
    else:
        assert plan.retrieval is not None  # `check` makes sure
        documents = CorpusRetrieval.open(plan.retrieval)
    if plan.base is not None:  # `trainer` compares the base's tokenizer with the corpus's
        return documents, own_tokenizer(plan.base)
    chats = documents.tokenizer.chat_template is not None  # a model trained from scratch cannot chat
    return documents, load_tokenizer(documents.path) if chats else documents.tokenizer


def _read(corpus: TextCorpus, tokenizer: PreTrainedTokenizerFast) -> DocumentView:
    """The documents of a text-only model."""
    found, groups = tokenized(list(corpus.documents()), tokenizer)
    return DocumentView([{"input_ids": document} for document in found], of_images=groups)


def _retrieve(plan: TrainingPlan, corpus: TextCorpus, name: str) -> CorpusRetrieval:
    """Retrieves a corpus into a folder next to `out`, so that it is not published with the model."""
    if launched_processes() > 1:
        raise ValmError("only one process can retrieve: run `valm retrieve` first, and give --retrieval")
    assert plan.kb is not None
    out = Path(plan.out).absolute()
    given: Any = {"corpus": corpus, "kb": plan.kb, "tokenizer": plan.base, "allow_download": plan.allow_download}
    return run_retrieval(RetrievalPlan(out=out.with_name(f"{out.name}-{name}"), **given))
