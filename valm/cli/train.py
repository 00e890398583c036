"""valm train."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from valm.cli.config import TrainingOptions
from valm.cli.corpus import add_corpus, chosen_corpus
from valm.cli.options import (
    Commands,
    add_allow_download,
    add_device,
    command,
    not_negative,
    positive,
    seed,
)
from valm.errors import ValmError

if TYPE_CHECKING:
    from valm.training import TrainingPlan
    from valm.training.image_trainer import ImageTrainer


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
        help="with --base: initial bias of each head's image scores (default: -10, at which no image counts)",
    )
    train.add_argument(
        "--score-scale",
        type=float,
        help="initial value of a learned weight on the retrieval score, added to the image's attention scores "
        "(default: retrieval scores are not used)",
    )
    train.add_argument(
        "--min-score",
        type=score,
        metavar="SCORE",
        help="a token whose best image has a lower retrieval score sees none; auto chooses it from --questions or "
        "--ordinary-text (default: each token but the first of a document sees -k images)",
    )
    train.add_argument(
        "--questions",
        type=Path,
        metavar="CORPUS",
        help="with --min-score auto: texts at whose last tokens images matter; 95 in 100 of them keep theirs",
    )
    train.add_argument(
        "--ordinary-text",
        type=Path,
        metavar="CORPUS",
        help="with --min-score auto, instead: texts that need no images; 5 in 100 of their tokens see some",
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
    train.add_argument(
        "--image-dropout",
        type=float,
        metavar="SHARE",
        help="share of the documents that train without their images, others in each pass, so that the model stays "
        "good without any (default: 0)",
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
        "on it at 20 steps of the training (--eval_steps), and the best checkpoint becomes the model",
    )
    train.add_argument(
        "--patience",
        type=not_negative,
        help="with --validation: stop after so many evaluations that were no better; 0: never (default: 3)",
    )
    train.add_argument(
        "--no-mix",
        action="store_true",
        help="with --base, --unfreeze and --validation: do not mix the trained weights with the base's at the end, in "
        "the share that predicts the validation documents best",
    )
    add_device(train, "images are retrieved (training itself takes the GPUs that torch has)")


def score(text: str) -> float | str:
    return text if text == "auto" else float(text)


def at_least_2(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not at least 2: the block before the last sees the images")
    return int(text)


def chosen_plan(arguments: argparse.Namespace) -> TrainingPlan:
    """The value of the options of `valm train`; where none was given, the plan's own default.

    Raises:
        ValmError: those of the corpus do not go together.
    """
    from valm.training import TrainingPlan

    options = vars(arguments) | {"corpus": chosen_corpus(arguments), "mix": not arguments.no_mix}
    names = [field.name for field in dataclasses.fields(TrainingPlan)]
    return TrainingPlan(**{name: options[name] for name in names if options[name] is not None})


def print_held_out(training: ImageTrainer) -> None:
    """Prints the perplexities of the documents that were held out, if there are any: those that
    `valm.training.mix.mix` found, or the logged one of the model."""
    numbers = training.model_numbers()
    lines = {"eval_perplexity_base": "of the base", "eval_perplexity_trained": "after the training"}
    if "base_share" in numbers:
        lines["eval_perplexity"] = f"mixed with the base, whose share is {numbers['base_share']:g}"
    lines["eval_perplexity_without_images"] = "the same without images"
    if "eval_perplexity_base" not in numbers:
        best = training.args.load_best_model_at_end
        last = "of the best checkpoint, at step {}, which is the model" if best else "at the last evaluation"
        lines = {"eval_perplexity": last.format(f"{numbers['steps']:.0f}")}
    for name, what in lines.items():
        if name in numbers:
            print(f"held-out perplexity {numbers[name]:.2f} {what}")
    if numbers.get("eval_perplexity_base", math.inf) < numbers.get("eval_perplexity", 0.0):
        print("the base reads the validation text better than this model: train for fewer steps, or on more text")


def run_train(arguments: argparse.Namespace) -> None:
    if "hub_token" in arguments.fields:
        raise ValmError("--hub_token would stand in the model card: give the token as HF_TOKEN in the environment")
    plan = chosen_plan(arguments)
    training = plan.run(command=shlex.join(["valm", *arguments.command_line]))
    if training.is_world_process_zero():
        print_held_out(training)
        losses = training.losses()
        print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} as last logged; written to {plan.out}")
