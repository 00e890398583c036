"""Compares how many processes a launcher has started with how many work together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from valm.errors import ValmError

if TYPE_CHECKING:  # `check_alone` runs before other imports
    from transformers import TrainingArguments

# Variables in which torchrun, accelerate and MPI store the number of processes.
NUMBERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_processes() -> int:
    """Number of processes that torchrun, accelerate or MPI has started for this command."""
    return next((int(os.environ[name]) for name in NUMBERS if os.environ.get(name, "").isdigit()), 1)


def check_alone(command: str) -> None:
    """Checks that no launcher has started several processes of `command`, which needs only one.

    Raises:
        ValmError: there are several; each would do all the work and write to the same folder.
    """
    launched = launched_processes()
    if launched > 1:
        raise ValmError(
            f"{command} runs in one process, but {launched} were launched: start it without torchrun or "
            "accelerate launch"
        )


def check_processes(arguments: TrainingArguments) -> None:
    """Compares the launched processes with what `arguments` set up.

    Raises:
        ValmError: each process would train a separate model and write it to the same folder; or fsdp has no effect.
    """
    from accelerate.utils import parse_flag_from_env
    from transformers.training_args import ParallelMode

    if arguments.fsdp and arguments.device.type == "cpu":  # accelerate silently ignores it there
        raise ValmError("fsdp divides a model among several GPUs and has no effect on CPUs: leave it out (--fsdp)")
    launched = launched_processes()
    if launched > 1 and (launched != arguments.world_size or arguments.parallel_mode == ParallelMode.NOT_PARALLEL):
        raise ValmError(
            f"{launched} processes were launched, but each would train by itself on {arguments.device}: use as many "
            "GPUs, or train on CPUs with use_cpu (--use_cpu)"
        )
    # accelerate's launcher for CPUs sets both variables, but starts only one process and does not say how many were
    # asked for; its launcher for one GPU sets the first to False
    if launched == 1 and parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise ValmError(
            "accelerate launch has started one process of several, as it does on CPUs without MPI: launch them with "
            "torchrun --nproc-per-node N, or give --num_processes 1 with MASTER_PORT unset"
        )
