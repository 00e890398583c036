"""Clients that stream answers at the same time from `valm serve`, and from a server of the bare model.

A decoder of SmolLM2-135M's shape with random weights, augmented: each token sees K images of a knowledge base of
100,000, found by a text tower of ViT-B/32's size. The peer `transformers serve` answers with the same decoder without
images, and is skipped where its packages (transformers[serving]) are missing. Each row is all answers of its clients;
its note has tokens per second and, in ms, the 50th and 95th percentile of the first and of each further part.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import valm
from benchmarks.valm.inputs import clip, knowledge_base_of, prose
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

TOWER, K, STORED = "ViT-B/32", 4, 100_000
NEW = 16
WORDS = 24  # of a prompt
OURS, ALONE, BARE = "valm serve", "valm serve --max-batch 1", "transformers serve, no images"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bare decoder, and the augmented one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    ids = {"bos_token_id": 49406, "eos_token_id": None, "pad_token_id": 49407}  # so that each answer has its length
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49408, **sizes, **heads, **ids)).eval()
    folder, of_clip = tmp_path_factory.mktemp("serving"), clip(TOWER)
    # parts of characters are sent with the token that ends them: these are never the likeliest
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
def servers(folders: tuple[Path, Path]) -> Iterator[dict[str, int]]:
    """The port of each server, which is started when it is first asked for."""
    started: dict[str, subprocess.Popen[str]] = {}

    class Ports(dict[str, int]):
        def __missing__(self, name: str) -> int:
            bare, model = folders
            clip_of = ["--clip", str(model.with_name("clip"))]
            commands = {
                OURS: [*valm_command(model), *clip_of],
                ALONE: [*valm_command(model), *clip_of, "--max-batch", "1"],
                BARE: [*transformers_command(), str(bare), "--port", "8765"],
            }
            process = subprocess.Popen(commands[name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started[name] = process
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"http://[^:]+:(\d+)", line):
                    self[name] = int(found[1])
                    return self[name]
            raise AssertionError(f"{name} did not start")

    try:
        yield Ports()
    finally:
        for process in started.values():
            process.kill()


def valm_command(model: Path) -> list[str]:
    return [sys.executable, "-m", "valm", "serve", str(model), "--port", "0", "--max-waiting", "64"]


def transformers_command() -> list[str]:
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    return [str(Path(sys.executable).with_name("transformers")), "serve"]


def answer(port: int, prompt: str, model: str) -> tuple[list[float], int | None]:
    """Seconds until each part of a streamed answer, and its tokens where the server says them."""
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


@pytest.mark.parametrize("name", [OURS, ALONE, BARE])
@pytest.mark.parametrize(
    "clients", [1, 8, pytest.param(4, marks=pytest.mark.full), pytest.param(16, marks=pytest.mark.full)]
)
def bench_serving(measure, device, servers, folders, clients, name):
    if device.type != "cpu":
        pytest.skip("the servers run on the CPU")
    port = servers[name]
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
        rounds=3,
        note=note,
    )
