"""valm train."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from valm.cli.config import TrainingOptions
from valm.cli.corpus import add_corpus, chosen_corpus
from valm.cli.options import Commands, command
from valm.errors import ValmError
from valm.options import add_fields, given_fields
from valm.training.plan import TrainingPlan

if TYPE_CHECKING:
    from valm.training.image_trainer import ImageTrainer


EXAMPLE = "valm train --base base --retrieval retrieved --kb kb --out model"
DESCRIPTION = (
    "train a VaLM; with --base, a pretrained decoder that sees images; without --kb, a text-only baseline (GPT-2* of "
    "the paper). Each field of transformers' TrainingArguments is an option too, such as "
    "--gradient_accumulation_steps 4, --bf16, --save_steps 100 or --report_to tensorboard"
)


def add_to(commands: Commands) -> None:
    help = "train a language model that sees images, or a text-only baseline"
    train = command(commands, "train", run_train, help, EXAMPLE, description=DESCRIPTION)
    train.prepare = TrainingOptions(train)
    add_corpus(train)
    train.add_argument("--config", type=Path, help="YAML file of options and fields; the command line overrides it")
    add_fields(train, TrainingPlan)


def chosen_plan(arguments: argparse.Namespace) -> TrainingPlan:
    """The options of `valm train` as a plan, with the defaults of the plan for all others.

    Raises:
        ValmError: the options of the corpus contradict each other.
    """
    given = given_fields(TrainingPlan, arguments)
    return TrainingPlan(**given | {"corpus": chosen_corpus(arguments)})


def print_held_out(training: ImageTrainer) -> None:
    """Prints the perplexities of the held-out documents, if any: what `valm.training.mix.mix` measured, or the logged
    perplexity of the model."""
    numbers = training.model_numbers()
    lines = {"eval_perplexity_base": "of the base", "eval_perplexity_trained": "after the training"}
    if "base_share" in numbers:
        lines["eval_perplexity"] = f"mixed with the base, whose share is {numbers['base_share']:g}"
    lines["eval_perplexity_without_images"] = "without images"
    if "eval_perplexity_base" not in numbers:
        best = training.args.load_best_model_at_end
        last = "of the best checkpoint, at step {}, which is the model" if best else "at the last evaluation"
        lines = {"eval_perplexity": last.format(f"{numbers['steps']:.0f}")}
    for name, what in lines.items():
        if name in numbers:
            print(f"held-out perplexity {numbers[name]:.2f} {what}")
    if numbers.get("eval_perplexity_base", math.inf) < numbers.get("eval_perplexity", 0.0):
        print("the base predicts the validation text better than this model: train for fewer steps, or on more text")


def run_train(arguments: argparse.Namespace) -> None:
    if "hub_token" in arguments.fields:
        raise ValmError("--hub_token would stand in the model card: give the token as HF_TOKEN in the environment")
    plan = chosen_plan(arguments)
    plan.check()
    plan.check_paths()  # before imports that take seconds

    from valm.training.run import run_plan

    training = run_plan(plan, command=shlex.join(["valm", *arguments.command_line]))
    if training.is_world_process_zero():
        print_held_out(training)
        losses = training.losses()
        said = f"loss {losses[0]:.3f} as first logged, {losses[-1]:.3f} as last; " if losses else ""
        print(f"{said}written to {plan.out}")
