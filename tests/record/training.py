"""Losses of each step of tiny trainings, which must stay equal unless a change intends otherwise.

They depend on the order of the documents, their images and the weights.

    python -m tests.record.training    # writes tests/record/training.safetensors with the current code
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.record.drawn import draw, save
from tests.record.retrieval import tiny_clip, write_embeddings
from tests.valm.other_tokenizers import LINES, llama_like
from valm.cli import main as valm
from valm.knowledge_base.build import build

OUTPUTS = Path(__file__).with_suffix(".safetensors")
STEPS = 200
OF_ALL = ["--steps", str(STEPS), "--batch-size", "3", "--lr", "1e-2", "--context", "24", "--logging_steps", "1"]
NEW = ["--model", "2x32x2"]
IMAGES = ["--retrieval", "{retrieval}", "--kb", "{kb}", *NEW]
BASE = ["--retrieval", "{of_base}", "--base", "{base}", "--kb", "{kb}", "--layer", "1"]
COMMANDS = {
    "text alone": ["{corpus}", "--tokenizer", "{clip}", *NEW],
    "images": IMAGES,
    "cut": [*IMAGES, "--min-score", "0.2"],
    "held out": [*IMAGES, "--validation", "0.25", "--patience", "0", "--eval_steps", "50"],
    **{twin: [*IMAGES, "--min-score", "0.2", "--twin", twin] for twin in ("text", "random", "shuffled", "blind")},
    "base": [*BASE, "--logit-bias", "-2"],
    "limited softmax": [*BASE, "--limit-softmax"],
    "states below": [*BASE, "--cache-below", "{folder}/below"],
    "two processes": IMAGES,
}


def write_inputs(folder: Path) -> dict[str, Path]:
    """The inputs of the commands, by name."""
    clip = tiny_clip()
    clip.save(folder / "clip")
    build(write_embeddings(folder / "embeddings"), folder / "kb", clip, progress=False)
    (folder / "corpus.txt").write_text("\n".join([*LINES, *(line.lower() for line in LINES), "a dog.", "blue grass"]))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokenizer = llama_like()
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    draw(base)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    names = {name: folder / name for name in ("clip", "kb", "base", "retrieval", "of_base")}
    paths = {**names, "corpus": folder / "corpus.txt", "folder": folder}
    retrieve = ["retrieve", paths["corpus"], "--kb", paths["kb"], "--clip", paths["clip"], "-k", "2"]
    run([*retrieve, "--out", paths["retrieval"]])
    run([*retrieve, "--tokenizer", paths["base"], "--out", paths["of_base"]])
    return paths


def run(arguments: list[object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert valm([str(argument) for argument in arguments]) == 0


def losses(folder: Path, name: str, paths: dict[str, Path]) -> Tensor:
    """The loss of each step of a command, (STEPS,)."""
    out = folder / "runs" / name.replace(" ", "-")
    command = ["train", *(argument.format(**paths) for argument in [*COMMANDS[name], *OF_ALL]), "--out", str(out)]
    if name == "two processes":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([*launch, "-m", "valm", *command], check=True, env=environment, capture_output=True)
    else:
        run(command)
    newest = max(out.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.partition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=torch.float64)


def outputs(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, losses) for every command; works in the empty `folder`."""
    paths = write_inputs(folder)
    for name in COMMANDS:
        yield name, losses(folder, name, paths)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save(dict(outputs(Path(folder))), OUTPUTS)


if __name__ == "__main__":
    main()
