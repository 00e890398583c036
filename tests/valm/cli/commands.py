"""Calls the valm command from tests, and the sizes of the models that it trains there."""

import json
import re
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

from valm.cli import main

THINGS = {"apple": "red", "sea": "blue", "leaf": "green", "lemon": "yellow", "coal": "black", "snow": "white"}
STEPS = ["--steps", "3", "--batch-size", "4"]
SIZE = ["--model", "3x32x4", "--context", "32", *STEPS]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def wrong_inputs(said):
    """Parametrizes a test by command lines and the sentence `said` of each; {world} and {tmp} are the folders."""
    return pytest.mark.parametrize(("command", "message"), said.items(), ids=said)


@contextmanager
def serving(model, *options):
    """The process of `valm serve` and its address."""
    command = [sys.executable, "-m", "valm", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())[0]
        finally:
            process.kill()


def asked(address, **fields):
    """The open answer to a request for a completion."""
    body, headers = json.dumps(fields).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{address}/completions", body, headers), timeout=120)


def evaluations(folder):
    """The results of each evaluation during the training in `folder`, from its last checkpoint."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "eval_loss" in entry]
