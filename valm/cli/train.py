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
    """Prints the perplexities of the held-out documents, if any: the last that was logged of the model, and that of the
    base, which is the model without images."""
    numbers = training.model_numbers()
    if "eval_perplexity" not in numbers:
        return
    best = training.args.load_best_model_at_end
    last = f"of the best checkpoint, at step {numbers['steps']:.0f}, which is the model"
    print(f"held-out perplexity {numbers['eval_perplexity']:.2f} {last if best else 'at the last evaluation'}")
    base = numbers.get("eval_perplexity_base", math.inf)
    if math.isfinite(base):
        print(f"held-out perplexity {base:.2f} of the base, which is the model without images")
    if base < numbers["eval_perplexity"]:
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
