"""Clients that stream answers at the same time from `valm serve`, and from a server of the decoder without images.

The model is an augmented decoder of SmolLM2-135M's shape with random weights. Each token sees K of 100,000 images,
found by a text encoder of ViT-B/32's size. The peer `transformers serve` runs the decoder without images. Without its
packages (transformers[serving]) the peer is skipped. Each row covers all answers of its clients. Its note gives
tokens per second, and in ms the 50th and 95th percentile of the first and of each further part.
"""

from __future__ import annotations

import functools
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import valm
from benchmarks.sizes import sized
from benchmarks.valm.inputs import IDS, clip, knowledge_base_of, prose, smollm2
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

TOWER, K, STORED = "ViT-B/32", 4, sized(100_000, 100)
NEW = sized(16, 3)
WORDS = 24  # per prompt
OPTIONS = {"valm serve": [], "valm serve --max-batch 1": ["--max-batch", "1"]}
BARE = "transformers serve, no images"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The decoder without images, and the augmented decoder."""
    model = smollm2(**IDS | {"eos_token_id": None, "pad_token_id": 49407})  # so that no answer ends early
    folder, of_clip = tmp_path_factory.mktemp("serving"), clip(TOWER)
    # a part of a character is sent with the token that completes it, so such tokens must never be the likeliest
    parts = [id for id in range(len(of_clip.tokenizer)) if "\ufffd" in of_clip.tokenizer.decode([id])]
    with torch.no_grad():
        model.get_input_embeddings().weight[parts] = 0
    of_clip.save(folder / "clip")
    model.save_pretrained(folder / "bare")
    of_clip.tokenizer.save_pretrained(folder / "bare")
    vectors = np.random.default_rng(0).standard_normal((STORED, of_clip.embed_dim), dtype=np.float32)
    kb = knowledge_base_of([vectors], folder / "kb", of_clip)
    valm.augment(model, of_clip.embed_dim, K, logit_bias=0.0)
    model.set_retriever(Retriever(ContextEncoder(of_clip), kb, K))
    save_checkpoint(model, of_clip.tokenizer, folder / "model")
    return folder / "bare", folder / "model"


@pytest.fixture(scope="module")
def port_of(folders: tuple[Path, Path]) -> Iterator[Callable[[str], int]]:
    """The port of each server, which starts on first use."""
    started: list[subprocess.Popen[str]] = []

    @functools.cache
    def port(name: str) -> int:
        command = bare_server(folders[0]) if name == BARE else [*our_server(folders[1]), *OPTIONS[name]]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        lines = []
        for line in started[-1].stdout or []:
            lines.append(line)
            if found := re.search(r"http://[^:]+:(\d+)", line):
                return int(found[1])
        raise AssertionError(f"{name} did not start: {''.join(lines[-5:])}")

    try:
        yield port
    finally:
        for process in started:
            process.kill()


def our_server(model: Path) -> list[str]:
    clip_of = ["--clip", str(model.with_name("clip"))]
    return [sys.executable, "-m", "valm", "serve", str(model), *clip_of, "--port", "0", "--max-waiting", "64"]


def bare_server(model: Path) -> list[str]:
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--port", str(port)]


def answer(port: int, prompt: str, model: str) -> tuple[list[float], int | None]:
    """Seconds until each part of a streamed answer, and its number of tokens if the server reports it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": prompt, "max_tokens": NEW, "stream": True, "temperature": 0, "model": model}
    body["stream_options"] = {"include_usage": True}
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    times, tokens = [], None
    for line in response:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - begin)
            if usage := json.loads(line.removeprefix(b"data: ")).get("usage"):
                tokens = usage["completion_tokens"]
    connection.close()
    return times, tokens


@pytest.mark.parametrize("name", [*OPTIONS, BARE])
@pytest.mark.parametrize("clients", [1, 8, *(pytest.param(clients, marks=pytest.mark.full) for clients in (4, 16))])
def bench_serving(measure, device, port_of, folders, clients, name):
    if device.type != "cpu":
        pytest.skip("the servers run on the CPU")
    port = port_of(name)
    words = " ".join(prose()[:40]).split()
    prompts = [" ".join(words[WORDS * number : WORDS * (number + 1)]) for number in range(clients)]
    model = str(folders[0]) if name == BARE else "model"

    def together() -> list[tuple[list[float], int | None]]:
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda prompt: answer(port, prompt, model), prompts))

    def check(found: list[tuple[list[float], int | None]]) -> None:
        assert all(tokens in (NEW, None if name == BARE else NEW) for _, tokens in found)

    def note(found: list[tuple[list[float], int | None]]) -> str:
        first = [times[0] for times, _ in found]
        steps = np.concatenate([np.diff(times[:-1]) for times, _ in found])
        percentiles = [f"{1e3 * np.percentile(of, p):.0f}" for of in (first, steps) for p in (50, 95)]
        rate = clients * NEW / max(times[-1] for times, _ in found)
        return f"{rate:.1f} tokens/s; first {'/'.join(percentiles[:2])}, further {'/'.join(percentiles[2:])} ms"

    measure(
        group=f"serving {clients} clients, {NEW} tokens each, SmolLM2-135M's shape, {STORED // 1000}k images, K {K}",
        name=name,
        function=together,
        check=check,
        note=note,
    )
