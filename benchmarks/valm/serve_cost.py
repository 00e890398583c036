"""What `valm serve` saves and costs: processes with a retriever each, beside processes that ask one server.

    python -m benchmarks.valm.serve_cost --images 200000 --processes 2

Each process retrieves the images of running text of its own, with one thread and at the same time as the others; the
server has as many threads as there are processes. Printed are the queries a second of all together, and the resident
memory after it (PSS, which counts a shared page once) of these processes, of the server, and of Ray's others with that
of `valm serve`. The CLIP is ViT-B/32's text tower with random weights; the vectors are random.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.valm.inputs import clip, knowledge_base_of, prose
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.ray_server import RetrievalServer, server_name
from valm.retrieval.retriever import Retriever
from valm.tokenizer import clip_tokenizer

ROWS, TOKENS = 4, 256
K = 4
NAME = "serve-cost"


def megabytes(process: psutil.Process) -> float:
    return process.memory_full_info().pss / 1e6


def batches(number: int, count: int) -> list[torch.Tensor]:
    """`count` batches (ROWS, TOKENS) of ids and one more, which no other process has."""
    ids = clip_tokenizer()(" ".join(prose()), add_special_tokens=False, verbose=False)["input_ids"]
    each = ROWS * TOKENS
    return [
        torch.tensor(ids[start : start + each]).view(ROWS, TOKENS)
        for start in range(number * (count + 1) * each, (number + 1) * (count + 1) * each, each)
    ]


def work(kb: str, folder: Path, number: int, count: int) -> None:
    """In a process of its own: is ready, is told to begin, and says that it has done."""
    torch.set_num_threads(1)
    name = server_name(kb)
    if name is None:
        opened = ImageKnowledgeBase.open(kb)
        retriever = Retriever(ContextEncoder(opened.load_clip(folder / "clip")), opened, K)
    else:
        retriever = RetrievalServer(name).retriever(clip_tokenizer(), K)
    first, *others = batches(number, count)
    retriever.find(first)
    print("ready", flush=True)
    sys.stdin.readline()
    for ids in others:
        retriever.find(ids)
    print("done", flush=True)
    sys.stdin.readline()


def measure(kb: str, folder: Path, processes: int, count: int) -> None:
    command = [sys.executable, "-m", "benchmarks.valm.serve_cost", "--work", kb, "--folder", str(folder)]
    command += ["--batches", str(count), "--number"]
    workers = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]

    def all_say(word: str) -> None:
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline().strip() == word

    def tell_all() -> None:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()

    all_say("ready")
    start = time.perf_counter()
    tell_all()
    all_say("done")
    seconds = time.perf_counter() - start
    used = [megabytes(psutil.Process(worker.pid)) for worker in workers]
    print(f"{processes * count * ROWS * TOKENS / seconds:,.0f} queries a second; processes {sum(used):,.0f} MB", end="")
    tell_all()
    for worker in workers:
        worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batches", type=int, default=20, help=f"of {ROWS} x {TOKENS} tokens, for each process")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.folder, arguments.number, arguments.batches)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tower = clip("ViT-B/32")
        tower.save(folder / "clip")
        vectors = np.random.default_rng(0).standard_normal((arguments.images, tower.embed_dim), dtype=np.float32)
        kb = knowledge_base_of([vectors], folder / "kb", tower).path
        print("a retriever in each process: ", end="", flush=True)
        measure(str(kb), folder, arguments.processes, arguments.batches)
        print()
        serve = [sys.executable, "-m", "valm", "serve", str(kb), "--clip", str(folder / "clip"), "--name", NAME]
        serve += ["--cpus", str(arguments.processes)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # Ray's choice
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            print("one server:                  ", end="", flush=True)
            measure(f"ray:{NAME}", folder, arguments.processes, arguments.batches)
            started = psutil.Process(server.pid)
            found = {child: megabytes(child) for child in [started, *started.children(recursive=True)]}
            actor = sum(size for child, size in found.items() if "_Server" in " ".join(child.cmdline()))
            print(f", server {actor:,.0f} MB, Ray's others {sum(found.values()) - actor:,.0f} MB")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
