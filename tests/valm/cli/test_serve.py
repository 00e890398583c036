"""valm serve: another process, asked by curl and by many at once, and ended by signals."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.valm.cli.commands import THINGS, asked, run, serving, wrong_inputs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs the extra [serve]")
NEW = 3
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "serve.md"


def ask(address, prompt):
    """The status and the text, or the error's code."""
    try:
        with asked(address, prompt=prompt, max_tokens=NEW) as answer:
            return answer.status, json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["code"]


@pytest.fixture(scope="module")
def generated(world):
    """What `valm generate` says after each prompt."""
    found = {}
    for prompt in ["the most common color of tomato is", *(f"the color of the {name}" for name in list(THINGS)[:3])]:
        with redirect_stdout(io.StringIO()) as out:
            assert run("generate", world / "valm", prompt, "--max-new-tokens", NEW, "--json") == 0
        found[prompt] = json.loads(out.getvalue())[0]["text"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_page_get_what_generate_says(address, generated, tmp_path, monkeypatch):
    """Completions and chats, streamed and not, by the curl commands of docs/how-to/serve.md, of which curl's own
    settings lead to the server's port."""
    served = address.removeprefix("http://").removesuffix("/v1")
    (tmp_path / ".curlrc").write_text(f"silent\nshow-error\nconnect-to = 127.0.0.1:8000:{served}\n")
    monkeypatch.setenv("CURL_HOME", str(tmp_path))
    tried = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("curl "):
            continue
        words = shlex.split(line)
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        if "-d" not in words:
            assert json.loads(out)
            continue
        body = json.loads(words[words.index("-d") + 1])
        if body.get("stream"):
            *events, done = re.findall("data: (.*)", out)
            assert done == "[DONE]" and len(events) > 1
        else:
            events = [out]
        choices = [json.loads(event)["choices"][0] for event in events]
        texts = [{"content": "", **choice.get("delta", choice.get("message", {}))} for choice in choices]
        text = "".join(choice.get("text", part["content"]) for choice, part in zip(choices, texts, strict=True))
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        assert prompt + text == generated[prompt] and body["max_tokens"] == NEW
        tried.append((words[1].removeprefix("http://127.0.0.1:8000/v1"), "stream" in body))
    paths = ("/chat/completions", "/completions")
    assert sorted(tried) == [(path, stream) for path in paths for stream in (False, True)]


@pytest.mark.slow
def test_200_requests_at_once(address, generated):
    prompts = [list(generated)[number % len(generated)] for number in range(200)]
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda prompt: ask(address, prompt), prompts))
    assert found == [(200, generated[prompt].removeprefix(prompt)) for prompt in prompts]
    assert len(set(found)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_request(world, generated, number):
    """Each is answered, told that the server stops (on a slow machine), or finds nobody who accepts it."""
    with serving(world / "valm") as (process, address):
        prompts = list(generated) * 3
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = {pool.submit(answer_or_nobody, address, prompt): prompt for prompt in prompts}
            first = next(as_completed(answers))
            process.send_signal(number)
            found = [(each.result(), generated[prompt].removeprefix(prompt)) for each, prompt in answers.items()]
        assert process.wait(60) == 0
        said = process.stderr.read()  # before it was ready, what libraries say that are there, such as torchao
    assert said.splitlines()[-1] == "stopped" and "Traceback" not in said
    assert first.result()[0] == 200
    assert all(got in ((200, text), (503, "server_stopping"), "nobody") for got, text in found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of open files")
def test_half_requests_take_neither_all_files_nor_the_log(world):
    """Clients that send half a line are closed after a while, and others are answered meanwhile."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as served:
        resource.setrlimit(resource.RLIMIT_NOFILE, (120, hard))  # which the server inherits
        try:
            process, address = served.enter_context(serving(world / "valm"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        port = int(address.split(":")[2].partition("/")[0])
        halves = []
        for _ in range(140):
            half = socket.create_connection(("127.0.0.1", port), timeout=30)
            half.sendall(b"GET /hea")
            halves.append(half)
        for half in halves:
            with contextlib.suppress(ConnectionResetError):
                assert half.recv(1) == b""
            half.close()
        assert ask(address, "the")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert len(process.stderr.read().splitlines()) < 12


@pytest.mark.slow
def test_slow_clients_do_not_delay_the_end(world):
    """Clients that wait with half an upload, and clients that read nothing of a long answer. Docker waits for 10 s."""
    lines = ["POST {} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Content-Length: {}", "", ""]
    head = "\r\n".join(lines)
    unread = json.dumps({"prompt": ["the"] * 128, "max_tokens": 28, "logprobs": 5, "stream": True})
    with serving(world / "valm") as (process, address), contextlib.ExitStack() as stack:
        port = int(address.split(":")[2].partition("/")[0])
        for path, length, body in [("/explain", 1000, "{")] * 20 + [("/v1/completions", len(unread), unread)] * 3:
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", port))
            slow.sendall((head.format(path, length) + body).encode())
        assert ask(address, "the")[0] == 200
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and time.monotonic() - begin < 9.5
        said = process.stderr.read()
    assert said.splitlines()[-1] == "stopped" and "Traceback" not in said


def answer_or_nobody(address, prompt):
    try:
        return ask(address, prompt)
    except urllib.error.URLError as error:
        assert isinstance(error.reason, ConnectionRefusedError | ConnectionResetError)
        return "nobody"


@pytest.mark.slow
def test_the_next_signal_stops_at_once(world):
    """And tells it in the stream."""
    with serving(world / "valm") as (process, address):
        with asked(address, prompt="the", max_tokens=28, stream=True) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            last = answer.read().decode().strip().splitlines()[-1]
        assert process.wait(60) == 0
    assert "[DONE]" in last or "server_stopping" in last


@pytest.mark.slow
def test_a_model_without_images(world):
    with serving(world / "gpt2") as (_, address):
        assert ask(address, "the color of the sea")[0] == 200


@wrong_inputs(
    {
        "serve {tmp}/none": "no checkpoint folder {tmp}/none",
        "serve {tmp}/alone": "takes 2 images a token, but has no retriever: give it a knowledge base (--kb)",
        "serve {world}/valm --kb {tmp}/none": "{tmp}/none",
        "serve {world}/valm --host 300.0.0.1": "the model cannot be served at 300.0.0.1, port 8000",
    }
)
@pytest.mark.usefixtures("alone")
def test_wrong_input_is_one_sentence(sentence, command, message):
    sentence(command, message)


def test_a_taken_port_is_one_sentence(sentence):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence(f"serve {{world}}/valm --port {port}", f"the model cannot be served at 127.0.0.1, port {port}")


def test_without_the_extra_it_says_what_is_missing(sentence, monkeypatch):
    import valm.serving.app

    monkeypatch.setattr(valm, "serving", valm.serving)  # what is imported anew takes this name
    for name in [name for name in sys.modules if name.startswith("valm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    sentence("serve {world}/valm", "valm serve needs the package uvicorn: pip install -e '.[serve]'")
