"""A training from beginning to end: what `valm train` does, and what Python does by `TrainingPlan(...).run()`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from valm.clip.clip import Clip
from valm.clip.device import open_device
from valm.clip.tokenizer import begin_id, clip_tokenizer, load_tokenizer, own_tokenizer, tokenize_documents
from valm.corpus.min_score import MinScore
from valm.corpus.retrieved import CorpusRetrieval, retrieve_corpus
from valm.corpus.texts import TextCorpus
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.augment import augment
from valm.model.checkpoint import load_decoder
from valm.model.config import ValmConfig
from valm.model.gpt2 import VaLMForCausalLM
from valm.retrieval.context import QUERIES
from valm.retrieval.retriever import BlindRetriever, Retriever
from valm.retrieval.source import ImageSource, open_encoder
from valm.store.files import output_folder
from valm.training.callbacks import Patience, ended_by_signals, show_progress
from valm.training.data import TWINS, hold_out, twin, with_min_score
from valm.training.image_trainer import ImageTrainer
from valm.training.launch import launched_processes
from valm.training.mix import SHARES, base_weights, mix
from valm.training.run_note import begun_checkpoint, content_of, note_numbers, note_run, only_training
from valm.training.train import trainer, training_arguments

STEPS = 1000
# Evaluations of a training, and how many without gain end it, unless the fields say otherwise.
EVALUATIONS, PATIENCE = 20, 3
# Images a token sees and kind of the retrieval query, where the corpus is retrieved here.
IMAGES, QUERY = 4, "eot"
# Tokens whose queries a blind model keeps from one epoch to the next.
CACHED_QUERIES = 1 << 17
# Fields of a new model, and their defaults; a pretrained decoder has its own.
SIZES = {"layers": 12, "width": 768, "heads": 12}
# Fields of a pretrained decoder only.
BASE_FIELDS = ("layer", "unfreeze", "logit_bias", "fusion_lr", "cache_below")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training is. Its fields are the options of `valm train`, whose names the error messages use.

    Attributes:
        out: folder of the checkpoints and of the model.
        corpus: the texts to train on. With `kb` their images are retrieved, into a folder beside `out`.
        retrieval: instead, the folder that `valm retrieve` wrote.
        kb: folder of the knowledge base; None = the model sees no images.
        clip, allow_download: as in `open_encoder`, where the corpus is retrieved or the twin is blind. Without `kb`,
            `clip` is the CLIP whose tokenizer the model reads with; None = CLIP's own.
        device: where images are retrieved, as for `open_device`. Training itself takes the GPUs that torch has.
        tokenizer: another tokenizer for the model: folder or Hugging Face name; None = the base's, or CLIP's.
        images: K, images a token sees; None = 4.
        query: kind of the retrieval query (`ContextEncoder`); None = "eot".
        twin: trains this control of the model with `kb` instead (`valm.training.data.twin`).
        base: augments this pretrained decoder instead of making a new model: folder or Hugging Face name.
        layer, unfreeze, logit_bias: of the base, as in `augment`; None = its defaults.
        score_scale: as in `augment`, of a new model too; a `retrieval` must have scores.
        min_score: as in `augment`, of a new model too; or "auto", which chooses it from `questions` or `ordinary_text`
            (`MinScore`). A `retrieval` must have scores.
        questions, ordinary_text: as in `MinScore`; with a `retrieval` they are results of `valm retrieve` too.
        fusion_lr, cache_below: of the base, as in `trainer`.
        limit_softmax: as in `trainer`.
        image_dropout: as in `trainer`; the text-only twin ignores it.
        layers, width, heads: of a new model; None = 12, 768 and 12.
        context: most tokens of a document, or of a part of it.
        steps: updates; None = 1000, or what num_train_epochs in `fields` says.
        batch_size: documents of a step and process.
        lr: learning rate.
        seed: of the weights, the order, the documents held out and dropout.
        validation: what to evaluate on: a text file, a result of `valm retrieve`, or the fraction of the documents to
            hold out. The best checkpoint then becomes the model.
        patience: stop after so many evaluations that were no better, 0 = never; None = 3.
        mix: with `base` and `validation`, mix the trained weights with the base's at the end (`valm.training.mix`).
        resume: resume from the newest checkpoint in `out`, if any.
        fields: fields of transformers' TrainingArguments; they come before `steps`, `batch_size`, `lr` and `seed`.
    """

    out: str | os.PathLike
    corpus: TextCorpus | None = None
    retrieval: str | os.PathLike | None = None
    kb: str | os.PathLike | None = None
    clip: str | None = None
    allow_download: bool = False
    device: str = "auto"
    tokenizer: str | None = None
    images: int | None = None
    query: str | None = None
    twin: str | None = None
    base: str | None = None
    layer: int | None = None
    unfreeze: str | None = None
    logit_bias: float | None = None
    score_scale: float | None = None
    min_score: float | str | None = None
    questions: str | os.PathLike | None = None
    ordinary_text: str | os.PathLike | None = None
    fusion_lr: float | None = None
    cache_below: str | os.PathLike | None = None
    limit_softmax: bool = False
    image_dropout: float = 0.0
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    context: int = 512
    steps: int | None = None
    batch_size: int = 16
    lr: float = 5e-4
    seed: int = 0
    validation: str | os.PathLike | float | None = None
    patience: int | None = None
    mix: bool = True
    resume: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, *, command: str | None = None) -> ImageTrainer:
        """Trains, and writes the model into `out`. In a launched training all processes call it.

        Args:
            command: for the model card (`write_card`).

        Returns:
            The Trainer after the training.

        Raises:
            ValmError: fields do not go together, or with what `out` holds; something cannot be read or does not belong
                together; another process trains in `out`; or as in `ImageTrainer.train`.
            KeyboardInterrupt: Ctrl-C or SIGTERM has ended it, after a step, with a checkpoint.
        """
        self.check()
        settings = training_arguments(self.out, **self.training_fields())
        with output_folder(self.out) as out:
            return self._run(out, settings, command)

    def _run(self, out: Path, settings: TrainingArguments, command: str | None) -> ImageTrainer:
        checkpoint = begun_checkpoint(out, self.resume, settings.should_save)
        for name, source in (("questions", self.questions), ("ordinary-text", self.ordinary_text)):
            if source is not None and not Path(source).exists():  # read only once the corpus is retrieved
                raise ValmError(f"--{name}: there is no {source}")
        kb = None if self.kb is None else ImageKnowledgeBase.open(self.kb)
        dataset, tokenizer = self._open_corpus(kb, "retrieval")
        min_score = self._min_score(kb, dataset, tokenizer)
        documents, held_out = self._split(kb, dataset, min_score, settings.seed)
        torch.manual_seed(settings.seed)
        model = self._model(kb, dataset, tokenizer, min_score)
        sees = model.fusion_options
        base = None if self.base is None or held_out is None else base_weights(model)
        patience = self._patience(settings)
        training = trainer(
            model,
            documents,
            kb if sees.retrieves else None,  # a blind model makes its queries as it trains
            tokenizer=tokenizer,
            arguments=settings,
            eval_dataset=held_out,
            row_length=self.context,
            cache_below=self.cache_below,
            fusion_lr=self.fusion_lr if sees.num_images > 0 else None,
            limit_softmax=self.limit_softmax,
            image_dropout=self.image_dropout if sees.num_images > 0 else 0.0,
            callbacks=[Patience(patience)] if patience else None,
        )
        if base is not None and (training.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            if self.mix and base:
                raise ValmError(
                    "weights that FSDP or DeepSpeed's ZeRO-3 divide among the processes cannot be mixed: give --no-mix"
                )
            base = None
        own: dict[str, Any] = {"twin": self.twin, "limit_softmax": self.limit_softmax or None}
        own["image_dropout"] = self.image_dropout or None
        own["context"] = self.context
        validation = None if self.validation is None else validation_of(self.validation)
        own["validation"] = None if validation is None else str(validation)
        own["validation_data"] = content_of(held_out) if isinstance(validation, Path) else None
        note_run(out, training, dataset, own | self.training_fields())
        show_progress(training, "train")
        if self.resume and settings.should_log:
            begins = "at step 0: there is no checkpoint" if checkpoint is None else f"from {Path(checkpoint).name}"
            print(f"the training in {out} goes on {begins}", file=sys.stderr)
        # saving a model locks the folder itself
        with only_training(out) if settings.should_save else nullcontext():
            with ended_by_signals(training):
                training.train(resume_from_checkpoint=checkpoint)
            if base is not None:
                training.numbers = mix(training, base, SHARES if self.mix and base else SHARES[:1])
                note_numbers(out, training)
            training.write(out, tokenizer, command=command)
        return training

    def check(self) -> None:
        """Checks the fields against each other; nothing is opened.

        Raises:
            ValmError: some do not go together.
        """
        if (self.corpus is None) == (self.retrieval is None):
            raise ValmError("give either a corpus or --retrieval")
        for name in ("images", *SIZES, "context", "steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValmError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
        for name in ("lr", "fusion_lr"):
            if (value := getattr(self, name)) is not None and not value >= 0:  # NaN neither
                raise ValmError(f"--{name.replace('_', '-')} is {value}, expected at least 0")
        if self.patience is not None and self.patience < 0:
            raise ValmError(f"--patience is {self.patience}, expected at least 0, which is never")
        for name, kinds in (("twin", TWINS), ("query", QUERIES)):
            if (value := getattr(self, name)) is not None and value not in kinds:
                raise ValmError(f"{name} must be one of {', '.join(kinds)}, got {value!r}")
        if self.validation is None and self.patience is not None:
            raise ValmError("--patience looks at the evaluations: give --validation too")
        if not self.mix and (self.base is None or self.validation is None):
            raise ValmError("--no-mix is of a pretrained decoder that is evaluated: give --base and --validation too")
        for name, is_for in {**dict.fromkeys(BASE_FIELDS, True), **dict.fromkeys(SIZES, False)}.items():
            if getattr(self, name) is not None and is_for != (self.base is not None):
                kind = "a pretrained decoder: give --base too" if is_for else "a new model: --base has its own"
                raise ValmError(f"--{name.replace('_', '-')} is of {kind}")
        # those of a `retrieval` were decided with it
        of_images = ("twin", "score_scale", "min_score", "questions", "ordinary_text", "logit_bias", "fusion_lr")
        of_images = (*of_images, *(() if self.retrieval else ("images", "query")))
        given = {name: getattr(self, name) for name in of_images} | {"image_dropout": self.image_dropout or None}
        for name, value in given.items():
            if value is not None and self.kb is None:
                raise ValmError(f"--{name.replace('_', '-')} is of a model with images: give its --kb too")
        if not 0 <= self.image_dropout < 1:
            raise ValmError(f"--image-dropout is {self.image_dropout}, expected at least 0 and below 1")
        if self.clip is not None and self.kb is None and (self.tokenizer or self.base):
            raise ValmError(
                "without --kb, --clip has the model's tokenizer, and so have --tokenizer and --base: drop it"
            )
        if self.score_scale is not None and self.twin in ("random", "shuffled"):
            raise ValmError(
                f"--twin {self.twin} exchanges images, and their retrieval scores are not known: give it without "
                "--score-scale"
            )
        MinScore(self.min_score, self.questions, self.ordinary_text).check()
        if "output_dir" in self.fields:
            raise ValmError("output_dir is the folder that --out names: leave it out")

    def training_fields(self) -> dict[str, Any]:
        """The fields of TrainingArguments that are given, or follow from other fields of the plan."""
        found: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 10, "logging_first_step": True}
        if self.steps is not None or "num_train_epochs" not in self.fields:
            found["max_steps"] = STEPS if self.steps is None else self.steps
        found |= {"per_device_train_batch_size": self.batch_size, "learning_rate": self.lr, "seed": self.seed}
        found |= self.fields
        if self.validation is not None:
            # where the epochs say how many steps there are, a share of them
            default = max(1, found["max_steps"] // EVALUATIONS) if found.get("max_steps", -1) > 0 else 1 / EVALUATIONS
            steps = found.get("save_steps", found.get("eval_steps", default))
            best = {"eval_strategy": "steps", "eval_steps": steps, "save_steps": steps, "load_best_model_at_end": True}
            best |= {"per_device_eval_batch_size": found["per_device_train_batch_size"]}
            found = best | found
        return found

    def _patience(self, settings: TrainingArguments) -> int:
        """Evaluations without gain that end the training, 0 = none."""
        if self.patience is not None:
            return self.patience
        return PATIENCE if self.validation is not None and settings.load_best_model_at_end else 0

    def _min_score(
        self, kb: ImageKnowledgeBase | None, dataset: Any, tokenizer: PreTrainedTokenizerFast
    ) -> float | None:
        """The `min_score` of the documents, also of those of a twin."""
        if kb is None or self.min_score is None:
            return None
        if not isinstance(self.min_score, str):
            return self.min_score
        retriever = None if self.corpus is None else self._retriever(kb)
        chosen = MinScore(self.min_score, self.questions, self.ordinary_text)
        found = chosen.find(kb, dataset.query, tokenizer, retriever)
        print(f"min_score {found:.4f}: below it a token sees no images", file=sys.stderr)
        return found

    def _model(
        self,
        kb: ImageKnowledgeBase | None,
        dataset: Any,
        tokenizer: PreTrainedTokenizerFast,
        min_score: float | None,
    ) -> Any:
        """The model or its twin, before the training."""
        images: dict[str, Any] = {}
        if kb is not None and self.twin != "text":
            blind = self.twin == "blind"
            images = {"num_images": 1 if blind else dataset.k, "image_dim": kb.dim, "blind": blind}
            images["min_score"] = None if blind else min_score
        model = self._new(tokenizer, images) if self.base is None else self._augmented(self.base, images)
        if kb is not None and self.twin == "blind":
            source = ImageSource.of_knowledge_base(kb, dataset.query, **dataset.segments)
            of_clip: Any = {"clip": self.clip, "allow_download": self.allow_download}
            retriever = model.finder.open(source, dataset.tokenizer, device=open_device(self.device), **of_clip)
            model.set_retriever(BlindRetriever(retriever.encoder, CACHED_QUERIES))
        return model

    def _new(self, tokenizer: PreTrainedTokenizerFast, images: dict[str, Any]) -> Any:
        """A VaLM with random weights, or without images GPT-2*."""
        sizes = SIZES | {name: value for name in SIZES if (value := getattr(self, name)) is not None}
        config = ValmConfig(
            vocab_size=len(tokenizer),
            n_positions=self.context,
            n_layer=sizes["layers"],
            n_embd=sizes["width"],
            n_head=sizes["heads"],
            bos_token_id=begin_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            score_scale=self.score_scale if images else None,
            **(images or {"num_images": 0, "image_dim": sizes["width"]}),
        )
        return VaLMForCausalLM(config)

    def _augmented(self, base: str, images: dict[str, Any]) -> Any:
        """The pretrained decoder `base`, augmented, or without images its text-only twin."""
        given = {"layer": self.layer, "unfreeze": self.unfreeze, "logit_bias": self.logit_bias}
        said: Any = {name: value for name, value in given.items() if value is not None}
        if images:
            said["score_scale"] = self.score_scale
        elif self.unfreeze is None:
            raise ValmError("the text-only twin has no new parameters to train: give --unfreeze block or all")
        return augment(load_decoder(base), **(images or {"num_images": 0, "image_dim": 1}), **said)

    def _split(
        self, kb: ImageKnowledgeBase | None, dataset: Any, min_score: float | None, seed: int
    ) -> tuple[Any, Any]:
        """The documents to train on and those of `validation`, or None, with the images of the twin.

        Raises:
            ValmError: the two do not belong together.
        """

        def with_images(documents: Any) -> Any:
            seen = documents if self.twin in ("text", "blind") else with_min_score(documents, min_score)
            return seen if self.twin is None or kb is None else twin(self.twin, seen, len(kb), seed)

        if self.validation is None:
            return with_images(dataset), None
        found = validation_of(self.validation)
        if isinstance(found, float):
            return hold_out(with_images(dataset), found, seed)
        return with_images(dataset), with_images(self._open_validation(kb, dataset, found))

    def _open_validation(self, kb: ImageKnowledgeBase | None, dataset: Any, path: Path) -> Any:
        """The documents of `validation` that are in `path`.

        Raises:
            ValmError: they do not belong to `dataset`.
        """
        retrieved = path.is_dir()
        if self.retrieval is not None and not retrieved:
            raise ValmError(
                f"the corpus was retrieved: retrieve --validation {path} too, or give a fraction to hold out"
            )
        if retrieved:
            other = dataclasses.replace(self, corpus=None, retrieval=path)
        else:
            assert self.corpus is not None  # as `check` found
            texts = TextCorpus([path], column=self.corpus.column)
            other = dataclasses.replace(self, corpus=texts, retrieval=None)
        found, _ = other._open_corpus(kb, "validation-retrieval")
        if not isinstance(dataset, CorpusRetrieval):
            if retrieved:
                raise ValmError(
                    f"--validation {path} is a result of `valm retrieve`, and the corpus is none: give a text file"
                )
            return found
        for name in ("tokenizer", "eos", "knowledge_base", "k", "query", "overlap", "min_tokens", "precision"):
            here, there = (corpus.manifest["plan"].get(name) for corpus in (found, dataset))
            if here != there:
                raise ValmError(
                    f"--validation {path} was retrieved otherwise than the corpus: its {name.replace('_', ' ')} is "
                    f"{here}, not {there}"
                )
        return found

    def _open_corpus(self, kb: ImageKnowledgeBase | None, name: str) -> tuple[Any, PreTrainedTokenizerFast]:
        """The documents and the tokenizer of the model; `name`: of the folder in which their images are retrieved."""
        if self.corpus is None:
            documents = self._open_retrieval()
        elif kb is not None:
            documents = self._retrieve(self.corpus, kb, name)
        else:
            named = self.tokenizer or self.base
            if named:
                tokenizer = load_tokenizer(named) if self.base is None else own_tokenizer(named)
            else:
                tokenizer = Clip.load(self.clip).tokenizer if self.clip else clip_tokenizer()
            found = tokenize_documents(list(self.corpus.documents()), tokenizer)
            return [{"input_ids": document} for document in found], tokenizer
        if self.base is not None:  # `trainer` compares the base's own with the corpus'
            return documents, own_tokenizer(self.tokenizer or self.base)
        chats = documents.tokenizer.chat_template is not None  # which a model trained from nothing cannot
        return documents, load_tokenizer(documents.path) if chats else documents.tokenizer

    def _open_retrieval(self) -> CorpusRetrieval:
        decided = {"--tokenizer": self.tokenizer, "-k": self.images, "--query": self.query}
        if self.twin != "blind":  # which retrieves as it trains
            decided["--clip"] = self.clip
        given = next((name for name, value in decided.items() if value is not None), None)
        if given is not None:
            raise ValmError(f"{given} was decided when {self.retrieval} was retrieved; leave it out")
        assert self.retrieval is not None  # as `check` found
        return CorpusRetrieval.open(self.retrieval)

    def _retrieve(self, corpus: TextCorpus, kb: ImageKnowledgeBase, name: str) -> CorpusRetrieval:
        """Retrieves the images of `corpus` into a folder beside `out`, which is not published with the model."""
        if launched_processes() > 1:
            raise ValmError(
                "several processes train on what one has retrieved: run `valm retrieve`, and give --retrieval"
            )
        out = Path(self.out).absolute()
        return retrieve_corpus(corpus.documents(), self._retriever(kb), out.with_name(f"{out.name}-{name}"))

    def _retriever(self, kb: ImageKnowledgeBase) -> Retriever:
        named = self.tokenizer or self.base
        encoder = open_encoder(
            kb,
            QUERY if self.query is None else self.query,
            load_tokenizer(named, chats=self.base is not None) if named else None,
            clip=self.clip,
            allow_download=self.allow_download,
            device=open_device(self.device),
        )
        return Retriever(encoder, kb, IMAGES if self.images is None else self.images)


def validation_of(given: str | os.PathLike | float) -> float | Path:
    """The fraction or the path that `validation` of a plan means; a text may be either."""
    if isinstance(given, float):
        return given
    try:
        return float(given) if isinstance(given, str) else Path(given)
    except ValueError:
        return Path(given)
