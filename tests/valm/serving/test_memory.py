"""The memory of `valm serve` through requests that once took gigabytes of it, and its end while it decodes images."""

import base64
import importlib.util
import io
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

import valm
from tests.valm.cli.commands import serving
from tests.valm.models import llama_of
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs the extra [serve]"),
]
K = 4
LIMIT = 6 << 30  # of the server's own memory, so that a fault does not take the machine's
PEAK, LEFT = 2 << 30, 1 << 29
SIXTY = " ".join(["the red apple"] * 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small decoder with CLIP's whole vocabulary and a context of 1,024 tokens, its CLIP and 16 pictures."""
    folder = tmp_path_factory.mktemp("memory")
    clip = make_clip(clip_tokenizer())
    clip.save(folder / "clip")
    (folder / "pictures").mkdir()
    for number in range(16):
        Image.new("RGB", (40, 40), (16 * number, 0, 0)).save(folder / "pictures" / f"{number}.png")
    kb = build(FolderSource(folder / "pictures"), folder / "kb", clip, progress=False)
    model = llama_of(clip.tokenizer, max_position_embeddings=1024)
    valm.augment(model, clip.embed_dim, K, logit_bias=0.0)
    model.set_retriever(Retriever(ContextEncoder(clip), kb, K))
    save_checkpoint(model, clip.tokenizer, folder / "model")
    return folder


class Served:
    """The process of a server, its memory, and requests to it."""

    def __init__(self, process, address):
        self.status, self.clear = (Path(f"/proc/{process.pid}/{name}") for name in ("status", "clear_refs"))
        self.process, self.root = process, address.removesuffix("/v1")

    def memory(self, name):
        """VmRSS or VmHWM, in bytes."""
        (line,) = (line for line in self.status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    def ask(self, path, body=None, timeout=600):
        """The status and the length of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, len(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, len(error.read())

    def beside(self, work, ask):
        """What `work` returns, with the status and the seconds of each `ask` meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            working, asked = pool.submit(work), []
            while not working.done():
                begin = time.monotonic()
                asked.append((ask()[0], time.monotonic() - begin))
                time.sleep(0.05)
            return working.result(), asked


@contextmanager
def served(folder):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, limits[1]))  # which the server inherits
    try:
        server = serving(folder / "model", "--clip", str(folder / "clip"), "--max-batch", "8")
        with server as (process, address):
            resource.setrlimit(resource.RLIMIT_DATA, limits)
            yield Served(process, address)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def upload(name, mode, side, format, **options):
    content = io.BytesIO()
    Image.new(mode, (side, side)).save(content, format, **options)
    return {"name": name, "data": base64.b64encode(content.getvalue()).decode()}


def explain(uploads):
    return {"prompt": SIXTY, "images": "uploaded", "k": 16, "uploads": uploads, "beside": ["retrieved"]}


def names(server):
    small = upload("x", "RGB", 40, "PNG")
    assert server.ask("/explain", explain([small | {"name": "<" * 5_000_000}]))[0] == 400
    assert server.ask("/explain", explain([small | {"name": "<" * 255}] * 16))[0] == 200


def pixels(server):
    assert server.ask("/explain", explain([upload("x", "L", 8192, "PNG")] * 16))[0] == 400
    photos = [upload("x", "RGB", 8192, "JPEG", progressive=True)] * 16
    largest = [upload("x", mode, 5792, "PNG") for mode in ("RGBA", "I;16")]

    def work():
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda uploads: server.ask("/explain", explain(uploads))[0], [photos, *zip(largest)]))

    found, others = server.beside(work, lambda: server.ask("/v1/completions", {"prompt": "the", "max_tokens": 1}))
    assert found == [200] * 3 and {status for status, _ in others} == {200}
    assert max(seconds for _, seconds in others) < 5


def echoes(server):
    body = {"prompt": [[320] * 900] * 100, "max_tokens": 0, "echo": True, "logprobs": 5}
    found, others = server.beside(lambda: server.ask("/v1/completions", body), lambda: server.ask("/health"))
    assert found[0] == 200 and found[1] > 10_000_000
    assert {status for status, _ in others} == {200} and max(seconds for _, seconds in others) < 0.5


def prompts(server):
    body = {"prompt": ["the red apple"] * 128, "max_tokens": 64}
    one = {"prompt": "the red apple", "max_tokens": 1}
    found, others = server.beside(
        lambda: server.ask("/v1/completions", body), lambda: server.ask("/v1/completions", one)
    )
    assert found[0] == 200 and {status for status, _ in others} == {200}


def searches(server):
    assert server.ask(f"/v1/images/search?q=a&k={'1' * 5000}")[0] == 422
    assert server.ask("/v1/images/search?q=a&k=16")[0] == 200


ALONE = [names, pixels, echoes, prompts, searches]


@pytest.mark.parametrize(
    "attacks", [*([one] for one in ALONE), ALONE], ids=lambda them: "all" if len(them) > 1 else them[0].__name__
)
def test_memory_stays_within_two_gigabytes_and_comes_back(folder, attacks):
    with served(folder) as server:
        for path, body in (("/explain", {"prompt": SIXTY, "images": "none"}), ("/v1/completions", {"prompt": "the"})):
            assert server.ask(path, body)[0] == 200
        idle = server.memory("VmRSS")
        for attack in attacks:
            begin = time.monotonic()
            attack(server)
            peak, left = (server.memory(name) - idle for name in ("VmHWM", "VmRSS"))
            print(f"{attack.__name__}: idle {idle:,}, peak +{peak:,}, left +{left:,}, {time.monotonic() - begin:.1f} s")
            assert peak < PEAK
        time.sleep(1)
        assert server.memory("VmRSS") - idle < LEFT
        assert server.ask("/health")[0] == 200


def test_a_signal_ends_the_decoding_of_images(folder):
    photos = [upload("x", "RGB", 4096, "JPEG", progressive=True)] * 16
    with served(folder) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.ask, "/explain", explain(photos)) for _ in range(2)]
        time.sleep(1)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0 and time.monotonic() - begin < 15
        assert {each.result()[0] for each in asked} <= {200, 503}
