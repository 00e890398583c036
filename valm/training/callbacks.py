"""Progress bars of trainings, and ending a training by a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from valm.progress import progress_bar


class ProgressBar(TrainerCallback):
    """A progress bar with a name and the last loss, for several trainings in a row."""

    def __init__(self, name: str, shown: bool = True):
        self.name, self.shown = name, shown

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        shown = self.shown and state.is_world_process_zero
        options: dict[str, Any] = {"total": state.max_steps, "initial": state.global_step}
        self.training_bar = progress_bar(shown=shown, desc=self.name, unit="step", **options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training_bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        logs: dict[str, Any] = more["logs"]
        shown = {name: logs[name] for name in ("loss", "eval_loss", "eval_perplexity") if name in logs}
        if shown and state.global_step < state.max_steps:
            self.training_bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training_bar.close()


def show_progress(training: Trainer, name: str, shown: bool = True) -> None:
    """Replaces a Trainer's progress bar, which prints a line for every log, with a `ProgressBar`."""
    for own in (PrinterCallback, ProgressCallback):
        training.remove_callback(own)
    training.add_callback(ProgressBar(name, shown))


class StopsOnSignal(TrainerCallback):
    """Ends a training with a KeyboardInterrupt once its first process was `asked` to end it: after the running step,
    with a checkpoint."""

    def __init__(self) -> None:
        self.asked = self._ends = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked = torch.tensor(int(self.asked), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(asked, 0)
        self._ends = bool(asked) and state.global_step < state.max_steps
        if self._ends:
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:  # otherwise an evaluation decides about saving
                control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._ends:
            raise KeyboardInterrupt(f"ended after step {state.global_step}, with a checkpoint")


@contextmanager
def ended_by_signals(training: Trainer) -> Iterator[None]:
    """Within the block, Ctrl-C or SIGTERM ends `training` as described in `StopsOnSignal`. A second signal does what it
    did before.

    Raises:
        KeyboardInterrupt: a signal ended the training; the message names the step.
    """
    stops = StopsOnSignal()
    handlers: dict[signal.Signals, Any] = {}
    training.add_callback(stops)

    def restore() -> None:
        while handlers:
            signal.signal(*handlers.popitem())

    def ask(*_: Any) -> None:
        stops.asked = True
        restore()

    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # background jobs ignore SIGINT
                handlers[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
