"""valm train."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.cli.config import TrainingOptions
from valm.cli.corpus import add_corpus, chosen_corpus
from valm.cli.options import Commands, add_allow_download, add_device, chosen_device, command, positive, seed
from valm.errors import ValmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from valm.corpus.retrieved import CorpusRetrieval
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.training.image_trainer import ImageTrainer

# The command's own options for fields of TrainingArguments, and their defaults.
FIELDS = {
    "steps": ("max_steps", 1000),
    "batch_size": ("per_device_train_batch_size", 16),
    "lr": ("learning_rate", 5e-4),
    "seed": ("seed", 0),
}
# Options of a new model, and their defaults; a pretrained decoder has its own.
SIZES = {"layers": 12, "width": 768, "heads": 12}
# Options of a pretrained decoder only.
BASE_OPTIONS = ("layer", "unfreeze", "logit_bias", "fusion_lr", "cache_below")
# Describes a training in its folder; a resumed one compares.
RUN_FILE = "run.json"
# Prefixes of fields that a resumed training may change: they change neither the data nor the weights after a step, or
# say how many steps there are, or which checkpoint becomes the model.
FREE_FIELDS = (
    *("dataloader_", "ddp_", "disable_tqdm", "eval_", "hub_", "load_best_", "log", "max_steps", "num_train_epochs"),
    *("push_", "report_to", "restore_callback_states", "run_name", "save_", "use_cpu"),
)
# The options of what RUN_FILE has under other names.
OPTIONS = {
    **{field: option for option, (field, _) in FIELDS.items()},
    "step_rows": "batch_size",
    "model.n_layer": "layers",
    "model.n_embd": "width",
    "model.n_head": "heads",
    "model.n_positions": "context",
    "model.num_images": "images",
    "model.image_score_scale_init": "score_scale",
    **{f"model.{option}": option for option in ("layer", "unfreeze", "logit_bias", "score_scale")},
    **{option: option for option in ("fusion_lr", "limit_softmax")},
}


def add_to(commands: Commands) -> None:
    train = command(
        commands,
        "train",
        run_train,
        "train a VaLM, with --base a pretrained decoder, or without --kb the text-only twin (GPT-2* of a VaLM); each "
        "field of transformers' TrainingArguments is an option too, such as --gradient_accumulation_steps 4, --bf16, "
        "--save_steps 100 or --report_to tensorboard",
    )
    train.prepare = TrainingOptions(train)
    add_corpus(train)
    train.add_argument(
        "--retrieval", type=Path, help="train on what `valm retrieve` wrote, without CLIP, instead of on a corpus"
    )
    train.add_argument("--config", type=Path, help="YAML file of options and fields; the command's own come first")
    train.add_argument("--out", type=Path, required=True, help="folder of the checkpoints and of the model")
    train.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in --out, if any")
    train.add_argument("--kb", type=Path, help="knowledge base; without it the model sees no images")
    train.add_argument("--clip", help="the CLIP whose tokenizer the model reads with (default: that of --kb)")
    add_allow_download(train)
    train.add_argument("--tokenizer", help="another tokenizer for the model: folder or Hugging Face name")
    train.add_argument("-k", "--images", type=positive, help="images a token sees (default: 4)")
    train.add_argument("--query", choices=["eot", "state"], help="kind of the retrieval query (default: eot)")
    train.add_argument(
        "--twin",
        choices=["text", "random", "blind", "shuffled"],
        help="train a control of the model with --kb instead, on the same tokens in the same order with the same seed: "
        "without images, with random ones of the knowledge base, with its retrieval query as each token's one "
        "image (Blind), or with the images of other tokens of the corpus",
    )
    train.add_argument(
        "--base", help="augment this pretrained decoder instead of making a new model: folder or Hugging Face name"
    )
    train.add_argument(
        "--layer",
        type=int,
        help="with --base: the layer that sees the images (default: -2, or the last that has keys of its own)",
    )
    train.add_argument(
        "--unfreeze",
        choices=["block", "all"],
        help="with --base: train this layer or all weights too, not the new parameters alone",
    )
    train.add_argument(
        "--logit-bias",
        type=float,
        help="with --base: what each head first adds to its scores of images (default: -10, closed)",
    )
    train.add_argument(
        "--score-scale",
        type=float,
        help="initial value of a learnt scale, which times the retrieval score of an image is added to its attention "
        "scores (default: these are not used); a --retrieval must have been made with --scores",
    )
    train.add_argument(
        "--fusion-lr", type=float, help="with --base: learning rate of the new parameters (default: --lr)"
    )
    train.add_argument(
        "--cache-below",
        type=Path,
        metavar="FOLDER",
        help="with --base: compute what the layer reads once into this folder, which twins can share, and train from "
        "there; all below it must be frozen",
    )
    train.add_argument(
        "--limit-softmax",
        action="store_true",
        help="compute the training loss over the tokens of the corpus and a random sample of the others in each step, "
        "which is faster where the corpus has few",
    )
    train.add_argument("--layers", type=at_least_2, help="blocks; the last but one sees the images (default: 12)")
    train.add_argument("--width", type=positive, help="numbers in a hidden state (default: 768)")
    train.add_argument("--heads", type=positive, help="attention heads (default: 12)")
    train.add_argument("--context", type=positive, default=512, help="most tokens of a document, longer ones are cut")
    train.add_argument("--steps", type=positive, help="updates (default: 1000, or what --num_train_epochs says)")
    train.add_argument("--batch-size", type=positive, help="documents a step and process (default: 16)")
    train.add_argument("--lr", type=float, help="learning rate (default: 5e-4)")
    train.add_argument("--seed", type=seed, help="of weights, order and dropout (default: 0)")
    train.add_argument(
        "--validation",
        metavar="CORPUS",
        help="text file, result of `valm retrieve`, or fraction of the documents to hold out, such as 0.01: perplexity "
        "on it every --save_steps steps, and the best checkpoint becomes the model",
    )
    train.add_argument("--patience", type=positive, help="stop after so many evaluations that were no better")
    add_device(train, "images are retrieved (training itself takes the GPUs that torch has)")


def at_least_2(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not at least 2: the block before the last sees the images")
    return int(text)


def run_train(arguments: argparse.Namespace) -> None:
    import torch

    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.store.files import only_writer, writable_folder
    from valm.training.callbacks import Patience, show_progress
    from valm.training.train import trainer, training_arguments

    arguments.corpus = chosen_corpus(arguments)
    if (arguments.corpus is None) == (arguments.retrieval is None):
        raise ValmError("give either a corpus or --retrieval")
    if arguments.validation is None and arguments.patience is not None:
        raise ValmError("--patience looks at the evaluations: give --validation too")
    for name, is_for in {**dict.fromkeys(BASE_OPTIONS, True), **dict.fromkeys(SIZES, False)}.items():
        if getattr(arguments, name) is not None and is_for != (arguments.base is not None):
            kind = "a pretrained decoder: give --base too" if is_for else "a new model: --base has its own"
            raise ValmError(f"--{name.replace('_', '-')} is of {kind}")
    if "hub_token" in arguments.fields:
        raise ValmError("--hub_token would stand in the model card: give the token as HF_TOKEN in the environment")
    settings = training_arguments(arguments.out, **training_fields(arguments))
    out = writable_folder(arguments.out)
    checkpoint = newest_checkpoint(out, arguments.resume, settings.should_save)
    kb = ImageKnowledgeBase.open(arguments.kb) if arguments.kb else None
    if arguments.twin is not None and kb is None:
        raise ValmError("--twin is of a model with images: give its --kb too")
    if arguments.score_scale is not None:
        if kb is None:
            raise ValmError("--score-scale is of a model with images: give its --kb too")
        if arguments.twin in ("random", "shuffled"):
            raise ValmError(
                f"--twin {arguments.twin} exchanges images, and their retrieval scores are not known: give it without "
                "--score-scale"
            )
    dataset, tokenizer = open_corpus(arguments, kb, "retrieval")
    documents, held_out = split(arguments, kb, dataset, settings.seed)
    torch.manual_seed(settings.seed)
    options = image_options(arguments.twin, dataset, kb)
    if arguments.base is None:
        model = new_model(arguments, tokenizer, options)
    else:
        model = augmented_base(arguments, options)
        documents = in_blocks(documents, model, arguments.context, tokenizer)
        held_out = None if held_out is None else in_blocks(held_out, model, arguments.context, tokenizer)
    sees = model.image_options
    if sees.blind:
        model.set_retriever(open_blind_retriever(arguments, model, kb, dataset))
    training = trainer(
        model,
        documents,
        kb if sees.num_images > 0 and not sees.blind else None,  # a blind model retrieves as it trains
        tokenizer=tokenizer,
        arguments=settings,
        eval_dataset=held_out,
        row_length=arguments.context,
        cache_below=arguments.cache_below,
        fusion_lr=arguments.fusion_lr if sees.num_images > 0 else None,
        limit_softmax=arguments.limit_softmax,
        callbacks=[Patience(arguments.patience)] if arguments.patience else None,
    )
    note_run(training, dataset, arguments)
    show_progress(training, "train")
    # saving a model locks the folder itself
    lock = only_writer(out / RUN_FILE, f"another process is training in {out}: wait for its end, or choose another")
    with lock if settings.should_save else nullcontext():
        training.train(resume_from_checkpoint=checkpoint)
        training.write(out, tokenizer, command=shlex.join(["valm", *arguments.command_line]))
    if training.is_world_process_zero():
        losses = training.losses()
        print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; written to {out}")


def new_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> Any:
    """A VaLM with random weights, or without images GPT-2*; `options`: of its images."""
    from valm.clip.tokenizer import begin_id
    from valm.model.config import ValmConfig
    from valm.model.gpt2 import VaLMForCausalLM

    sizes = {name: getattr(arguments, name) or default for name, default in SIZES.items()}
    config = ValmConfig(
        vocab_size=len(tokenizer),
        n_positions=arguments.context,
        n_layer=sizes["layers"],
        n_embd=sizes["width"],
        n_head=sizes["heads"],
        bos_token_id=begin_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        image_score_scale_init=arguments.score_scale if options else None,
        **(options or {"num_images": 0, "image_dim": sizes["width"]}),
    )
    return VaLMForCausalLM(config)


def augmented_base(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    """The pretrained decoder `--base`, augmented, or without images its text-only twin; `options`: of its images."""
    from valm.model.augment import augment
    from valm.model.checkpoint import load_decoder

    given = {"layer": arguments.layer, "unfreeze": arguments.unfreeze, "logit_bias": arguments.logit_bias}
    said = {name: value for name, value in given.items() if value is not None}
    if options:
        said["score_scale"] = arguments.score_scale
    if not options and arguments.unfreeze is None:
        raise ValmError("the text-only twin has no new parameters to train: give --unfreeze block or all")
    return augment(load_decoder(arguments.base), **(options or {"num_images": 0, "image_dim": 1}), **said)


def in_blocks(documents: Any, model: Any, context: int, tokenizer: PreTrainedTokenizerFast) -> Any:
    """`documents`, those longer than `context`, or than the model can read, cut."""
    from valm.clip.tokenizer import begin_id
    from valm.model.checkpoint import positions
    from valm.training.blocks import Blocks

    return Blocks(documents, min(context, positions(model) or context), begin_id(tokenizer))


def training_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainingArguments; the command's own options are the defaults."""
    fields: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 10, "logging_first_step": True}
    for option, (field, default) in FIELDS.items():
        given = getattr(arguments, option)
        if given is not None or option != "steps" or "num_train_epochs" not in arguments.fields:
            fields[field] = default if given is None else given
    fields |= arguments.fields
    if arguments.validation is not None:
        steps = fields.get("save_steps", 500)
        best = {"eval_strategy": "steps", "eval_steps": steps, "save_steps": steps, "load_best_model_at_end": True}
        best |= {"per_device_eval_batch_size": fields["per_device_train_batch_size"]}
        fields = best | fields
    return fields


def newest_checkpoint(out: Path, resume: bool, writes: bool) -> str | None:
    """The checkpoint in `out` to resume from, None to start; `writes`: whether it is this process that writes to `out`.

    Raises:
        ValmError: `out` holds something, and no training is to be resumed in it; or not that of a training.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from valm_kernels.atomic_files import is_temporary, remove_leftovers

    if writes:  # the others may find what this one has written
        remove_leftovers(out)
        found = [file.name for file in out.iterdir() if not is_temporary(file.name)]
        if found and not resume:
            raise ValmError(f"the output folder {out} is not empty: choose another, or give --resume to continue in it")
        if found and RUN_FILE not in found:
            raise ValmError(f"{out} holds no training that could be resumed (it has no {RUN_FILE}): choose another")
    return get_last_checkpoint(str(out)) if resume else None


def note_run(training: ImageTrainer, dataset: CorpusRetrieval | Sequence[Any], arguments: argparse.Namespace) -> None:
    """Notes in the folder what this training is.

    Raises:
        ValmError: the folder has the note of another one.
    """
    from valm.store.files import read_json, write_json
    from valm_kernels.atomic_files import SAVE_WAIT_SECONDS, folder_lock
    from valm_kernels.json_files import short

    file = arguments.out / RUN_FILE
    fields = training_fields(arguments)
    # what a step reads is `step_rows`, and no number of an evaluation depends on its batches
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"):
        fields.pop(name, None)
    model: Any = training.model
    run = {
        "twin": arguments.twin,
        "base": getattr(model.config, "valm", {}).get("sketch"),
        "fusion_lr": training.fusion_lr,
        "limit_softmax": arguments.limit_softmax or None,
        "step_rows": training.get_total_train_batch_size(training.args),
        **fields,
        **model_settings(model.config),
        "data": content_of(dataset),
        "validation": arguments.validation,
    }
    run = {name: value for name, value in run.items() if not name.startswith(FREE_FIELDS)}
    if file.is_file():
        before = read_json(file, "the note on a training", dict[str, Any], "choose another folder")
        if (run["base"] is None) != (before.get("base") is None):
            kind = "a pretrained decoder (--base)" if run["base"] is None else "a new model, without --base"
            raise ValmError(f"{arguments.out} holds the training of {kind}; choose another folder")
        if run["base"] is not None and (other := other_base_tensor(model, before["base"])) is not None:
            raise ValmError(
                f"{arguments.out} holds the training of another base model: {other} had other values; choose another "
                "folder"
            )
        for name in dict.fromkeys([*run, *before]):
            there, here = before.get(name), json.loads(json.dumps(run.get(name)))
            if name != "base" and not name.startswith(FREE_FIELDS) and here != there:
                there, here = ("not given" if value is None else short(value) for value in (there, here))
                raise ValmError(
                    f"{arguments.out} holds another training: its {option_of(name)} is {there}, here it is {here}; "
                    "choose another folder"
                )
    elif training.is_world_process_zero():
        with folder_lock(arguments.out, SAVE_WAIT_SECONDS):
            if file.exists():
                raise ValmError(f"another process has started a training in {arguments.out}: choose another folder")
            write_json(file, run)


def other_base_tensor(model: Any, noted: Any) -> str | None:
    """The name of a tensor of the base that is not as RUN_FILE has noted it, None if there is none.

    noted: a sketch; of earlier versions the fingerprint of the fusion layer.
    """
    from valm.model.probe import decoder_layers
    from valm.model.sketch import fingerprint, other_tensor, other_weight, project

    if not isinstance(noted, dict):
        return "every tensor"
    if all(isinstance(value, float) for value in noted.values()):
        return other_weight(fingerprint(decoder_layers(model)[model.fusion_options.layer]), noted)
    return other_tensor(project(model, noted), noted)


def option_of(name: str) -> str:
    """What a user calls the setting `name` of RUN_FILE."""
    if name in OPTIONS:
        return f"--{OPTIONS[name].replace('_', '-')}" + (" of all processes together" if name == "step_rows" else "")
    return name if name.startswith("model.") or name == "data" else f"--{name}"


def model_settings(config: Any) -> dict[str, Any]:
    """All that the config says of the model, of an augmented one its base's and the fusion's together."""
    from valm.model.config_file import WEIGHTS_KEY

    found = config.to_diff_dict()
    found |= {**found.pop("base_config", {}), **found.pop("fusion", {})}
    return {
        f"model.{name}": found[name]
        for name in found
        if "version" not in name and name not in ("fingerprint", "sketch", WEIGHTS_KEY)
    }


def content_of(dataset: CorpusRetrieval | Sequence[Any]) -> str:
    """A hash of all the documents."""
    from valm.corpus.parts import fingerprint
    from valm.corpus.retrieved import CorpusRetrieval

    if isinstance(dataset, CorpusRetrieval):
        return dataset.fingerprint
    documents: Any = [document["input_ids"] for document in dataset]
    return fingerprint(documents)


def beside(out: Path, name: str) -> Path:
    """The folder of intermediate files of the model in `out`, which are not published with it."""
    return out.absolute().with_name(f"{out.absolute().name}-{name}")


def open_corpus(
    arguments: argparse.Namespace, kb: ImageKnowledgeBase | None, name: str
) -> tuple[CorpusRetrieval | list[dict[str, Any]], PreTrainedTokenizerFast]:
    """The documents and what they are read with; `name`: of the folder in which their images are retrieved."""
    if arguments.retrieval is not None:
        return open_retrieval(arguments)
    if kb is not None:
        return retrieved_corpus(arguments, kb, name)
    return plain_corpus(arguments)


def split(arguments: argparse.Namespace, kb: ImageKnowledgeBase | None, dataset: Any, seed: int) -> tuple[Any, Any]:
    """The documents to train on and those of `--validation`, or None, with the images of `--twin`.

    Raises:
        ValmError: the two do not belong together.
    """
    from valm.corpus.retrieved import CorpusRetrieval
    from valm.corpus.text import TextCorpus
    from valm.training.split import hold_out
    from valm.training.twins import twin

    def with_images(documents: Any) -> Any:
        return documents if arguments.twin is None or kb is None else twin(arguments.twin, documents, len(kb), seed)

    if arguments.validation is None:
        return with_images(dataset), None
    try:
        fraction = float(arguments.validation)
    except ValueError:
        pass
    else:
        return hold_out(with_images(dataset), fraction, seed)
    path = Path(arguments.validation)
    other = argparse.Namespace(**vars(arguments))
    other.corpus, other.retrieval = TextCorpus([path], column=arguments.column), path if path.is_dir() else None
    if isinstance(dataset, CorpusRetrieval) and arguments.retrieval is not None and other.retrieval is None:
        raise ValmError(f"the corpus was retrieved: retrieve --validation {path} too, or give a fraction to hold out")
    found, _ = open_corpus(other, kb, "validation-retrieval")
    if isinstance(dataset, CorpusRetrieval) != isinstance(found, CorpusRetrieval):
        raise ValmError(f"--validation {path} is a result of `valm retrieve`, and the corpus is none: give a text file")
    if isinstance(dataset, CorpusRetrieval) and isinstance(found, CorpusRetrieval):
        for name in ("tokenizer", "knowledge_base", "k", "query"):
            here, there = found.manifest["plan"][name], dataset.manifest["plan"][name]
            if here != there:
                raise ValmError(
                    f"--validation {path} was retrieved otherwise than the corpus: its {name.replace('_', ' ')} is "
                    f"{here}, not {there}"
                )
    return with_images(dataset), with_images(found)


def open_retrieval(arguments: argparse.Namespace) -> tuple[CorpusRetrieval, PreTrainedTokenizerFast]:
    from valm.clip.tokenizer import own_tokenizer
    from valm.corpus.retrieved import CorpusRetrieval

    decided = {
        "--clip": arguments.clip,
        "--tokenizer": arguments.tokenizer,
        "-k": arguments.images,
        "--query": arguments.query,
    }
    given = next((name for name, value in decided.items() if value is not None), None)
    if given is not None:
        raise ValmError(f"{given} was decided when {arguments.retrieval} was retrieved; leave it out")
    found = CorpusRetrieval.open(arguments.retrieval)
    # `trainer` compares the decoder's own with the corpus'
    return found, found.tokenizer if arguments.base is None else own_tokenizer(arguments.base)


def image_options(twin: str | None, dataset: Any, kb: ImageKnowledgeBase | None) -> dict[str, Any]:
    """What the config of the model, or of its `twin`, says of images; nothing where it sees none."""
    if kb is None or twin == "text":
        return {}
    return {"num_images": 1 if twin == "blind" else dataset.k, "image_dim": kb.dim, "blind": twin == "blind"}


def open_blind_retriever(arguments: argparse.Namespace, model: Any, kb: Any, dataset: Any) -> Any:
    """A `BlindRetriever` with the settings and tokenizer that `dataset` was retrieved with."""
    from valm.retrieval.note import RetrievalNote

    note = RetrievalNote.of_knowledge_base(kb, dataset.query)
    clip = {"clip": arguments.clip, "allow_download": arguments.allow_download}
    return model.open_retriever(note, dataset.tokenizer, device=chosen_device(arguments), **clip)


def retrieved_corpus(
    arguments: argparse.Namespace, kb: ImageKnowledgeBase, name: str
) -> tuple[CorpusRetrieval, PreTrainedTokenizerFast]:
    from valm.clip.tokenizer import load_tokenizer, own_tokenizer
    from valm.retrieval.note import open_encoder
    from valm.retrieval.retriever import Retriever
    from valm.training.launch import launched_processes

    if launched_processes() > 1:
        raise ValmError("several processes train on what one has retrieved: run `valm retrieve`, and give --retrieval")
    named = arguments.tokenizer or arguments.base
    tokenizer = load_tokenizer(named) if named else None
    encoder = open_encoder(
        kb,
        arguments.query or "eot",
        tokenizer,
        clip=arguments.clip,
        allow_download=arguments.allow_download,
        device=chosen_device(arguments),
    )
    retriever = Retriever(encoder, kb, arguments.images or 4)
    scores = arguments.score_scale is not None
    found = arguments.corpus.retrieve(retriever, beside(arguments.out, name), scores=scores)
    return found, encoder.tokenizer if arguments.base is None else own_tokenizer(named)


def plain_corpus(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], PreTrainedTokenizerFast]:
    from valm.clip.clip import Clip
    from valm.clip.tokenizer import clip_tokenizer, load_tokenizer, own_tokenizer, tokenize_documents

    if named := arguments.tokenizer or arguments.base:
        tokenizer = load_tokenizer(named) if arguments.base is None else own_tokenizer(named)
    else:
        tokenizer = Clip.load(arguments.clip).tokenizer if arguments.clip else clip_tokenizer()
    documents = tokenize_documents(list(arguments.corpus.documents()), tokenizer)
    return [{"input_ids": document} for document in documents], tokenizer
