"""The API over HTTP, in a thread of this process."""

import asyncio
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import torch
import uvicorn

from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import prompt_ids
from valm.serving.api import MAX_BODY, Api
from valm.serving.app import build_app
from valm.serving.engine import Engine
from valm.serving.page import Page

MAX_TOKENS = 20
JSON = {"Content-Type": "application/json"}


class Running:
    """A server, and requests to it."""

    def __init__(self, page, port):
        self.page, self.engine, self.port = page, page.api.engine, port

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

    def metric(self, name):
        """The sum of the metrics whose names begin so."""
        connection, response = self.open("/metrics")
        with closing(connection):
            assert response.headers["Content-Type"].startswith("text/plain")
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def stream(self, path, body):
        """The events of an answer."""
        connection, response = self.open(path, body | {"stream": True})
        with closing(connection):
            assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
            lines = response.read().decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        return [line.removeprefix("data: ") for line in lines]


@contextmanager
def running(model, tokenizer, max_waiting=8, max_batch=8, name="tiny", other=None):
    page = Page(Api(name, Engine(model, tokenizer, max_waiting, max_batch), MAX_TOKENS), other)
    app = build_app(page.api, ["127.0.0.1"], page)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Running(page, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
            page.api.engine._thread.join(60)
    assert not thread.is_alive() and not page.api.engine._thread.is_alive()


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
    with running(letters, letters, max_waiting=1, max_batch=1) as server:
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
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + "{% if add_generation_prompt %}dogs{% endif %}")
    body = {"messages": [{"role": "developer", "content": "a boat"}], "max_tokens": 9}
    _, answer = server.ask("/v1/chat/completions", body)
    text, before, _ = expected(model, tokenizer, "system a boat dogs", 9)
    assert answer["choices"][0]["message"]["content"] == text and answer["usage"]["prompt_tokens"] == before
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == "messages"
    assert "rejects this conversation: roles must alternate" in answer["error"]["message"]


def test_random_numbers_follow_the_seed(server):
    def text(**fields):
        body = {"prompt": "the sky", "max_tokens": 12, "temperature": 2, "top_p": 1} | fields
        return server.ask("/v1/completions", body)[1]["choices"][0]["text"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len({text() for _ in range(4)}) > 1
    assert text(temperature=1e-300) == text(temperature=0)


def test_several_prompts_are_answered_in_order(server, tiny):
    model, tokenizer = tiny
    texts = ["the sky", TEXTS[0], "a red apple."]
    prompts = [prompt_ids(tokenizer, text) for text in texts]
    expectations = [expected(model, tokenizer, text, 9) for text in texts]
    for asked in (texts, prompts):
        _, answer = server.ask("/v1/completions", {"prompt": asked, "max_tokens": 9})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["text"] for choice in answer["choices"]] == [text for text, *_ in expectations]
        assert answer["usage"]["prompt_tokens"] == sum(before for _, before, _ in expectations)
    *events, _ = server.stream("/v1/completions", {"prompt": prompts, "max_tokens": 9})
    choices = [json.loads(event)["choices"][0] for event in events]
    for index, (text, *_) in enumerate(expectations):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own][-2:] == [None, "length"]


def test_log_probabilities(server, tiny):
    """Of the prompt's tokens too where it is echoed; they are the model's, also beside a longer prompt, whose padding
    has none."""
    model, tokenizer = tiny
    ids, longer = (prompt_ids(tokenizer, text) for text in (TEXTS[0], " ".join(TEXTS)))
    body = {"prompt": [ids, longer], "max_tokens": 0, "echo": True, "logprobs": 2}
    choice, _ = server.ask("/v1/completions", body)[1]["choices"]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = choice["logprobs"]
    assert choice["text"] == tokenizer.decode(ids, skip_special_tokens=True) and len(found["tokens"]) == len(ids)
    assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
    own = [float(wanted[n, id]) for n, id in enumerate(ids[1:])]
    assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
    assert max(found["top_logprobs"][1].values()) == pytest.approx(float(wanted[0].max()), abs=1e-4)
    places, text = found["text_offset"], choice["text"]
    assert places[:2] == [0, 0]  # the token that begins a text has none
    for place, end, token in zip(places[1:], [*places[2:], len(text)], found["tokens"][1:], strict=True):
        assert text[place:end].strip() == token.strip()
    *events, _ = server.stream("/v1/completions", {"prompt": ids, "max_tokens": 3, "echo": True, "logprobs": 1})
    first = json.loads(events[0])["choices"][0]
    assert first["text"] == text and len(first["logprobs"]["tokens"]) == len(ids)
    body = {"prompt": ids, "max_tokens": 4, "logprobs": 0}
    whole = server.ask("/v1/completions", body)[1]["choices"][0]["logprobs"]
    *events, _ = server.stream("/v1/completions", body)
    parts = [json.loads(event)["choices"][0]["logprobs"] for event in events]
    for name in ("tokens", "token_logprobs"):
        assert [value for part in parts for value in part[name]] == whole[name] and len(whole[name]) == 4
    body = {"messages": [{"role": "user", "content": "the sky"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = server.ask("/v1/chat/completions", body)[1]["choices"][0]["logprobs"]["content"]
    assert len(content) == 3 and all(len(token["top_logprobs"]) == 2 for token in content)
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in content)  # the likeliest each time


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_tokens_are_decoded_once_and_not_on_the_event_loop(tiny, monkeypatch, stream):
    """Where evaluation harnesses ask for the log probabilities of many prompts, others are answered meanwhile."""
    model, tokenizer = tiny
    decode, decoded = tokenizer.decode, []

    def decode_aside(ids, **options):
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        decoded.append(tuple(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", decode_aside)
    ids = prompt_ids(tokenizer, TEXTS[0])
    body = {"prompt": [ids] * 8, "max_tokens": 0, "echo": True, "logprobs": 5, "stream": stream}
    with running(model, tokenizer) as server:
        connection, response = server.open("/v1/completions", body)
        with closing(connection):
            assert response.status == 200 and b"error" not in response.read()
    singles = [each for each in decoded if len(each) == 1]
    assert len(singles) == len(set(singles)) > 10 and decoded.count(tuple(ids)) == 8


@pytest.mark.slow
def test_health_is_answered_beside_a_harness(server):
    body = {"prompt": [[5, 6, 7] * 60] * 128, "max_tokens": 0, "echo": True, "logprobs": 5}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "/v1/completions", body)
        slowest = 0.0
        while not asked.done():
            begin = time.monotonic()
            assert server.ask("/health")[0] == 200
            slowest = max(slowest, time.monotonic() - begin)
            time.sleep(0.01)
    assert asked.result()[0] == 200 and slowest < 0.5


def test_an_answer_says_which_images_were_seen(server, tiny):
    retriever = tiny[0].retriever
    _, answer = server.ask("/v1/completions", {"prompt": TEXTS[0], "max_tokens": 2})
    images = answer["choices"][0]["images"]
    ids, scores = retriever.find([TEXTS[0]])
    best = int(ids.flatten()[scores.flatten().argmax()])
    assert images[0]["score"] == pytest.approx(float(scores.max()), abs=1e-3) and images[0]["id"] == best
    assert images[0]["uri"] == retriever.kb.item(best).uri
    assert [image["score"] for image in images] == sorted((image["score"] for image in images), reverse=True)
    *events, _ = server.stream("/v1/completions", {"prompt": TEXTS[0], "max_tokens": 2})
    assert json.loads(events[-1])["choices"][0]["images"] == images


def test_the_knowledge_base_is_searched(server, tiny):
    retriever = tiny[0].retriever
    status, answer = server.ask("/v1/images/search?q=a+red+boat&k=3")
    hits = retriever.search("a red boat", 3)
    assert status == 200 and [image["id"] for image in answer["data"]] == [item.id for _, item in hits]
    assert server.ask("/v1/images/search?q=+")[0] == 400
    for k in ("0", "65", "-1", "1.0", "x", "1" * 5000):
        status, answer = server.ask(f"/v1/images/search?q=a&k={k}")
        assert status == 422 and "k: expected a whole number from 1 to 64, got '" in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 200


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
        (b"{", 400, "the request is no JSON: EOF while parsing"),
        (b"[]", 400, "the request is a list of 0, expected a JSON object"),
        (b'{"prompt": "\xff"}', 400, "the request is no JSON: invalid unicode"),
        (b"[" * 100_000, 400, "the request is no JSON: recursion limit"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "temperature: expected a number from 0 to 2, got nan"),
        (b'{"prompt": [1, 9999]}', 400, "tokens, but no token 9999"),
        (b'{"prompt": "x", "model": "gpt-4"}', 404, "the model 'gpt-4' is not served here: ask for 'tiny'"),
        (b'{"prompt": "x", "max_tokens": 21}', 400, "max_tokens is 21, but this server generates 20 at most"),
        (b'{"prompt": "%s", "max_tokens": 20}' % (b"the " * 180), 400, "max_tokens must be 11 at most, got 20"),
        (b'{"prompt": "%s"}' % (b"the " * 192), 400, "the model reads 192 tokens, and the prompt has 193: shorten it"),
        (b'{"prompt": "%s"}' % (b"a" * MAX_BODY), 413, "the request contains more than 1,048,576 bytes"),
    ],
)
def test_wrong_requests_are_told_why(server, body, status, message):
    found, answer = server.ask("/v1/completions", body)
    assert found == status and message in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.ask("/health")[0] == 200


def test_metrics(server, tiny):
    names = ("valm_generated_tokens_total", "valm_prompt_tokens_total", "valm_searches_total")
    asked = 'valm_requests_total{endpoint="completions",status="200"}'
    before = [server.metric(name) for name in (*names, asked)]
    length = len(prompt_ids(tiny[1], TEXTS[0]))
    assert server.ask("/v1/completions", {"prompt": TEXTS[0], "max_tokens": 5})[0] == 200
    after = [server.metric(name) for name in (*names, asked)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, length, length + 4, 1]
    assert server.metric("valm_waiting") == 0


def test_other_doors_are_shut(server):
    status, answer = server.ask("/v1/completions", b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert status == 415 and "Content-Type: application/json" in answer["error"]["message"]
    assert server.ask("/v1/models/gpt-4")[0] == 404 and server.ask("/v1/completions")[0] == 405
    status, answer = server.ask("/reset", b"{}")
    assert status == 404 and answer["error"]["message"] == "POST /reset: Not Found"
    connection, response = server.open("/health", headers={"Host": "attacker.example"})
    with closing(connection):
        assert response.status == 400 and response.read() == b"Invalid host header"


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"Origin": "http://127.0.0.1:{port}"}, True),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_pages_elsewhere_ask_nothing(server, headers, allowed):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    body = json.dumps({"prompt": TEXTS[0], "images": server.page.choices[0]})
    for path, sent in (("/v1/images/search?q=a", None), ("/v1/models", None), ("/explain", body)):
        assert server.ask(path, sent, headers=JSON | headers)[0] == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("site", "allowed"), [("same-origin", True), ("none", True), ("same-site", False), ("cross-site", False)]
)
def test_a_search_is_for_the_own_page_and_the_page_may_be_linked_to(server, site, allowed):
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert server.ask("/v1/images/search?q=a", headers=headers)[0] == (200 if allowed else 403)
    connection, response = server.open("/", headers=headers)
    with closing(connection):
        assert response.status == 200


def test_more_requests_than_may_wait_are_told_so(of_letters, letters):
    body = {"prompt": "x", "max_tokens": 2}
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(of_letters.ask, "/v1/completions", body) for _ in range(2)]
        wait_for(lambda: len(of_letters.engine._open) == 2)
        connection, response = of_letters.open("/v1/completions", body)
        with closing(connection):
            assert response.status == 429 and response.headers["Retry-After"] == "1"
            assert "1 requests are already waiting: try again later" in response.read().decode()
        letters.go.release(4)
        found = [each.result() for each in asked]
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
    monkeypatch.setattr("valm.serving.bodies.BODY_SECONDS", 0.2)
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
    before = of_letters.metric('valm_requests_total{endpoint="completions",status="500"}')
    status, answer = of_letters.ask("/v1/completions", {"prompt": "x"})
    assert of_letters.metric('valm_requests_total{endpoint="completions",status="500"}') == before + 1
    assert status == 500 and answer["error"]["type"] == "server_error" and "secret" not in str(answer)
    letters.go.release(1)
    (event,) = of_letters.stream("/v1/completions", {"prompt": "x"})
    assert json.loads(event)["error"]["code"] == "internal_error"
    letters.error = None
    letters.go.release(1)
    assert of_letters.ask("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_the_end_is_told_in_either_way(of_letters, letters):
    connection, response = of_letters.open("/v1/completions", {"prompt": "x", "stream": True})
    with ThreadPoolExecutor(1) as pool, closing(connection):
        asked = pool.submit(of_letters.ask, "/v1/completions", {"prompt": "x"})
        wait_for(lambda: len(of_letters.engine._open) == 2)
        of_letters.engine.end()
        letters.go.release(1)
        event = response.read().decode()
        status, answer = asked.result()
    assert json.loads(event.strip().removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert status == 503 and answer["error"]["code"] == "server_stopping"


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
