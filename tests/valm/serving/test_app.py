"""The API over HTTP, in a thread of this process."""

import http.client
import json
import socket
import threading
import time
from contextlib import closing, contextmanager

import pytest
import torch
import uvicorn

from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import prompt_ids
from valm.serving.app import MAX_BODY, Api, build_app
from valm.serving.engine import Engine

MAX_TOKENS = 20
JSON = {"Content-Type": "application/json"}


class Running:
    """A server, and requests to it."""

    def __init__(self, engine, port):
        self.engine, self.port = engine, port

    def open(self, path, body=None, headers=JSON, method=None):
        """The connection, and the response whose head has come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        return connection, connection.getresponse()

    def ask(self, *arguments, **options):
        """The status, and the JSON that comes with it."""
        connection, response = self.open(*arguments, **options)
        with closing(connection):
            return response.status, json.loads(response.read())

    def stream(self, path, body):
        """The events of an answer."""
        connection, response = self.open(path, body | {"stream": True})
        with closing(connection):
            assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
            lines = response.read().decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        return [line.removeprefix("data: ") for line in lines]


@contextmanager
def running(model, tokenizer, max_waiting=8):
    engine = Engine(model, tokenizer, max_waiting)
    app = build_app(Api("tiny", engine, MAX_TOKENS), ["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Running(engine, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def tiny(make_served):
    return make_served()


@pytest.fixture(scope="module")
def server(tiny):
    with running(*tiny) as server:
        yield server


@pytest.fixture
def of_letters(letters):
    """A server whose tokens the test lets go."""
    with running(letters, letters, max_waiting=1) as server:
        yield server
        letters.go.release(1000)


def expected(model, tokenizer, prompt, length):
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    before, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (ids[0], found[0]))
    return whole.removeprefix(before), ids.shape[1], found.shape[1] - ids.shape[1]


def test_completions(server, tiny):
    text, before, new = expected(*tiny, TEXTS[0], 9)
    status, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": TEXTS[0], "max_tokens": 9})
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length" and choice["index"] == 0
    usage = {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}
    assert answer["usage"] == usage
    body = {"prompt": TEXTS[0], "max_tokens": 9, "stream_options": {"include_usage": True}}
    *events, done = server.stream("/v1/completions", body)
    *parts, last, of_usage = map(json.loads, events)
    assert done == "[DONE]" and len(parts) > 1
    assert "".join(part["choices"][0]["text"] for part in parts) == text
    assert {part["id"] for part in [*parts, last, of_usage]} == {parts[0]["id"]} != {answer["id"]}
    assert [part["choices"][0]["finish_reason"] for part in [*parts, last]] == [None] * len(parts) + ["length"]
    assert of_usage["choices"] == [] and of_usage["usage"] == usage
    assert server.ask("/v1/completions", {"prompt": "the"})[1]["usage"]["completion_tokens"] == 16


def test_chat(server, tiny):
    """Without a chat template the prompt is the text of the messages, line by line."""
    messages = [{"role": "system", "content": "a red apple."}, {"role": "user", "content": "the sky is"}]
    text, before, _ = expected(*tiny, "a red apple.\nthe sky is", 9)
    body = {"model": "tiny", "messages": messages, "max_completion_tokens": 9}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200 and answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == before
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    *events, done = server.stream("/v1/chat/completions", body)
    first, *parts, last = [json.loads(event)["choices"][0] for event in events]
    assert first["delta"]["role"] == "assistant" and last["delta"] == {} and last["finish_reason"] == "length"
    assert "".join(part["delta"]["content"] for part in parts) == text and done == "[DONE]"
    body = {"messages": messages}
    assert server.ask("/v1/chat/completions", body)[1]["usage"]["completion_tokens"] == MAX_TOKENS


def test_a_chat_template_writes_the_prompt(server, tiny, monkeypatch):
    model, tokenizer = tiny
    template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}dogs{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    body = {"messages": [{"role": "developer", "content": "a boat"}], "max_tokens": 9}
    _, answer = server.ask("/v1/chat/completions", body)
    text, before, _ = expected(model, tokenizer, "system a boat dogs", 9)
    assert answer["choices"][0]["message"]["content"] == text and answer["usage"]["prompt_tokens"] == before
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == "messages"
    assert "has no such conversation: roles must alternate" in answer["error"]["message"]


def test_random_numbers_follow_the_seed(server):
    def text(**fields):
        body = {"prompt": "the sky", "max_tokens": 12, "temperature": 2, "top_p": 1} | fields
        return server.ask("/v1/completions", body)[1]["choices"][0]["text"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len({text() for _ in range(4)}) > 1
    assert text(temperature=1e-300) == text(temperature=0)


def test_a_stop_text(server, tiny):
    text, _, _ = expected(*tiny, TEXTS[0], 9)
    body = {"prompt": TEXTS[0], "max_tokens": 9, "stop": text[4:7]}
    _, answer = server.ask("/v1/completions", body)
    choice = answer["choices"][0]
    assert choice["text"] == text[: text.index(text[4:7])] and choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 9
    assert server.stream("/v1/completions", body)[-1] == "[DONE]"


def test_models_and_health(server):
    card = {"id": "tiny", "object": "model", "created": 0, "owned_by": "local"}
    assert server.ask("/v1/models") == (200, {"object": "list", "data": [card]})
    assert server.ask("/v1/models/tiny") == (200, card)
    assert server.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "Invalid JSON: EOF while parsing"),
        (b"", 400, "Invalid JSON"),
        (b'{"prompt": "\xff"}', 400, "Invalid JSON: invalid unicode"),
        (b'{"prompt": "\\ud800"}', 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "Invalid JSON: recursion limit"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "temperature: Input should be a finite number"),
        (b'{"prompt": "x", "max_tokens": -1}', 400, "max_tokens: Input should be greater than or equal to 1"),
        (b'{"prompt": "x", "tools": [{}]}', 400, "this server has no 'tools': leave it out"),
        (b'{"prompt": "x", "model": "gpt-4"}', 404, "the model 'gpt-4' is not served here: ask for 'tiny'"),
        (b'{"prompt": "x", "max_tokens": 21}', 400, "max_tokens is 21, and this server generates 20 at most"),
        (b'{"prompt": "%s", "max_tokens": 20}' % (b"the " * 180), 400, "max_tokens must be 11 at most, got 20"),
        (b'{"prompt": "%s"}' % (b"the " * 192), 400, "the model reads 192 tokens, and the prompt has 193: shorten it"),
        (b'{"prompt": "%s"}' % (b"a" * MAX_BODY), 413, "the request has more than 1,048,576 bytes"),
    ],
)
def test_wrong_requests_are_told_why(server, body, status, message):
    found, answer = server.ask("/v1/completions", body)
    assert found == status and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"].keys() == {
        "message",
        "type",
        "param",
        "code",
    }
    assert server.ask("/health")[0] == 200


def test_other_doors_are_shut(server):
    status, answer = server.ask("/v1/completions", b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert status == 415 and "Content-Type: application/json" in answer["error"]["message"]
    assert server.ask("/v1/models/gpt-4")[0] == 404 and server.ask("/v1/completions")[0] == 405
    status, answer = server.ask("/reset", b"{}")
    assert status == 404 and answer["error"]["message"] == "POST /reset: Not Found"
    connection, response = server.open("/health", headers={"Host": "attacker.example"})
    with closing(connection):
        assert response.status == 400 and response.read() == b"Invalid host header"


def test_more_requests_than_may_wait_are_told_so(of_letters, letters):
    body = {"prompt": "x", "max_tokens": 2}
    found = []
    threads = [threading.Thread(target=lambda: found.append(of_letters.ask("/v1/completions", body))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(of_letters.engine._open) == 2)
    status, answer = of_letters.ask("/v1/completions", body)
    assert status == 429 and answer["error"]["message"] == "1 requests wait already: try again later"
    letters.go.release(4)
    for thread in threads:
        thread.join(60)
    assert [(status, answer["choices"][0]["text"]) for status, answer in found] == [(200, "ab")] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_holds_nobody_up(of_letters, letters, stream):
    body = json.dumps({"prompt": "x", "max_tokens": 20, "stream": stream})
    gone = http.client.HTTPConnection("127.0.0.1", of_letters.port)
    gone.request("POST", "/v1/completions", body, JSON)
    assert letters.begun.acquire(timeout=60)
    letters.go.release(1)
    if stream:
        assert gone.getresponse().readline().startswith(b"data: ")
    gone.sock.close()
    gone.close()
    wait_for(lambda: not of_letters.engine._open)
    letters.go.release(1 + 2)  # one that ends it
    _, answer = of_letters.ask("/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert answer["choices"][0]["text"] == "ab"


def test_a_request_that_does_not_come_in(server, monkeypatch):
    monkeypatch.setattr("valm.serving.app.BODY_SECONDS", 0.2)
    lines = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Content-Length: 9"]
    head = "\r\n".join([*lines, "", "{"]).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(head)
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert answer.status == 408 and "not complete after 0.2 seconds" in answer.read().decode()
    with socket.create_connection(("127.0.0.1", server.port)) as gone:
        gone.sendall(head)
    assert server.ask("/health")[0] == 200


def test_a_failure_is_told_and_survived(of_letters, letters):
    letters.error = RuntimeError("a secret")
    letters.go.release(1)
    status, answer = of_letters.ask("/v1/completions", {"prompt": "x"})
    assert status == 500 and answer["error"]["type"] == "server_error" and "secret" not in str(answer)
    letters.go.release(1)
    (event,) = of_letters.stream("/v1/completions", {"prompt": "x"})
    assert json.loads(event)["error"]["code"] == "internal_error"
    letters.error = None
    letters.go.release(1)
    assert of_letters.ask("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_the_end_is_told_in_either_way(of_letters, letters):
    connection, response = of_letters.open("/v1/completions", {"prompt": "x", "stream": True})
    status = []
    thread = threading.Thread(target=lambda: status.append(of_letters.ask("/v1/completions", {"prompt": "x"})))
    thread.start()
    wait_for(lambda: len(of_letters.engine._open) == 2)
    with closing(connection):
        of_letters.engine.end()
        letters.go.release(1)
        event = response.read().decode()
    thread.join(60)
    assert json.loads(event.strip().removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert status[0][0] == 503 and status[0][1]["error"]["code"] == "server_stopping"


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
