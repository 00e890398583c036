"""The page of a server: what it computes, and all of it in a real browser."""

import base64
import http.client
import io
import json
import select
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tests.valm.explain.conftest import kb, make_model, model
from tests.valm.serving.test_api import JSON, running, wait_for
from valm.errors import ValmError
from valm.explain.explanation import explain
from valm.serving import bodies
from valm.serving import page as page_module
from valm.serving.engine import Engine
from valm.serving.page import Asked, Upload

__all__ = ["kb", "make_model", "model"]

TEXT = "a red apple lies on the"
HOSTILE = "<b>${1}</b>{{x}}`"


@pytest.fixture
def server(model, tokenizer, make_model):
    with running(model, tokenizer, name="valm", other=("gpt2", make_model(0), tokenizer)) as server:
        yield server


@pytest.fixture
def page(server):
    return server.page


@pytest.fixture
def decoding(monkeypatch):
    """The sizes of the images that are decoded; clear `go` to hold them up."""
    seen = SimpleNamespace(sizes=[], begun=threading.Semaphore(0), go=threading.Event())
    transposed = ImageOps.exif_transpose

    def decode(image):
        seen.sizes.append(image.size)
        seen.begun.release()
        assert seen.go.wait(60)
        return transposed(image)

    seen.go.set()
    monkeypatch.setattr(ImageOps, "exif_transpose", decode)
    return seen


def picture(name, image):
    """An upload."""
    content = io.BytesIO()
    image.save(content, "JPEG" if name.endswith(".jpg") else "PNG")
    return {"name": name, "data": base64.b64encode(content.getvalue()).decode()}


def ask(page, images="retrieved", k=3, uploads=(), answers="", beside=(), prompt=TEXT):
    fields = {"prompt": prompt, "images": images, "k": k, "answers": answers, "beside": list(beside)}
    asked, opened = page._read(Asked(**fields, uploads=list(uploads)).model_dump_json().encode())
    return page.explanations(asked, [page_module._small(*image) for image in opened])


def test_the_switches_change_what_is_explained(page, model, tokenizer):
    own = explain(model, tokenizer, TEXT)
    (retrieved,) = ask(page).values()
    np.testing.assert_array_equal(retrieved.image_weights, own.image_weights)
    (five,) = ask(page, k=5).values()
    assert five.image_weights.shape[-1] == 5 and five.images_of(-1)[:3] == own.images_of(-1)
    (random,) = ask(page, images="random").values()
    assert [image.caption for image in random.images] != [image.caption for image in own.images]
    (none,) = ask(page, images="none").values()
    assert "switched off" in none.note and not np.allclose(none.probabilities, own.probabilities)
    leaf = picture("my leaf.png", Image.new("RGB", (40, 40), "green"))
    (uploaded,) = ask(page, images="uploaded", uploads=[Upload(**leaf)]).values()
    assert {image.caption for image in uploaded.images} == {"my leaf.png"}


def test_what_stands_beside_it(page):
    shown = ask(page, images="random", beside=["retrieved", "gpt2"], answers="red, blue")
    assert list(shown) == ["valm, 3 retrieved images", "valm, 3 random images", "gpt2"]
    assert {explanation.answers for explanation in shown.values()} == {("red", "blue")}
    assert list(ask(page, beside=["retrieved"])) == ["valm, 3 retrieved images"]


def test_models_have_the_switches_that_they_can_have(page, make_model, tokenizer):
    assert page.choices == ["retrieved", "random", "uploaded", "none"]
    with running(make_model(1, blind=True), tokenizer) as server:
        assert server.page.choices == ["its own query (blind)", "none"]
        (shown,) = ask(server.page, images=server.page.choices[0]).values()
        assert "Blind" in shown.note
    with running(make_model(0), tokenizer) as server:
        assert server.page.choices == ["none"]
    lost = make_model()
    lost.set_retriever(None)
    with pytest.raises(ValmError, match=r"has no retriever: give it a knowledge base \(--kb\)"):
        Engine(lost, tokenizer, 1)


def test_what_the_page_asks_is_answered(server):
    body = {"prompt": TEXT, "images": "retrieved", "k": 3, "beside": ["gpt2"]}
    status, answer = server.ask("/explain", body)
    assert status == 200 and len(answer["heads"]) == 2 and "What comes next" in answer["body"]
    _, response = server.open("/")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    text = response.read().decode()
    assert "which images the model looks at" in text and '<link rel="icon" href="data:' in text
    assert "<h1>valm</h1>" in text and "http://" not in text and "https://" not in text and " src=" not in text


def test_the_page_begins_with_a_caption(server, kb, monkeypatch):
    caption = 'a "brown" dog jumps over the fence'
    monkeypatch.setattr(kb, "item", lambda id: SimpleNamespace(caption=caption))
    monkeypatch.setattr(server.page, "prompt", page_module.Page(server.page.api).prompt)
    _, response = server.open("/")
    assert "required>a &#34;brown&#34; dog</textarea>" in response.read().decode()


@pytest.mark.parametrize(
    "captions, prompt",
    [
        (["", "tomato", "a brown dog jumps over the fence"], "a brown dog"),
        (["tomato", "frog"], "tomato"),
        (["a dog\nwhich swims in the sea", "two dogs run on a long beach"], "two dogs run"),
        (["two " + 1000 * "dogs "], " ".join(["two", *7 * ["dogs"]])),
        (["", ""], "a picture of"),
        ([], "a picture of"),
    ],
)
def test_the_first_prompt_is_half_a_caption(captions, prompt):
    assert page_module.first_prompt(captions) == prompt


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"images": "uploaded"}, "no uploaded images yet"),
        ({"images": "other"}, "images is 'other', expected one of retrieved, random, uploaded, none"),
        ({"images": "uploaded", "uploads": [{"name": "a.png", "data": "bm8="}]}, "cannot read the image a.png"),
        ({"images": "uploaded", "uploads": [{"name": "a" * 255, "data": "bm8="}]}, "cannot read the image aaa"),
        ({"images": "uploaded", "uploads": [{"name": "a.png", "data": "{}"}]}, "the image a.png: Only base64"),
        ({"k": 10**9}, "K is 1000000000, expected 1 to"),
        ({"k": "3"}, "k is invalid: Input should be a valid integer, got '3'"),
        (
            {"images": "uploaded", "uploads": [{"name": "a" * 256, "data": "bm8="}]},
            "uploads.0.name is invalid: String should have at most 255 characters, got 'aaa",
        ),
        ({"answers": "red,,blue"}, "the answer '' has no tokens"),
    ],
)
def test_wrong_input_is_one_sentence(server, fields, sentence):
    status, answer = server.ask("/explain", {"prompt": TEXT, "images": "retrieved", "k": 3} | fields)
    assert status == 400 and sentence in answer["error"]["message"]


def test_a_panic_of_the_tokenizer_is_one_sentence(server, page, monkeypatch):
    endless = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    endless.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    monkeypatch.setattr(page, "explanations", lambda asked, _: endless.encode(asked.prompt))
    status, answer = server.ask("/explain", {"prompt": "a" * 200 + "b", "images": "none"})
    assert status == 400 and "a tokenizer stopped; its tokenizer.json is damaged" in answer["error"]["message"]


def test_too_many_bytes_are_refused(server, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_BODY", 1000)
    assert server.ask("/explain", {"prompt": "a" * 2000, "images": "none"})[0] == 413


@contextmanager
def halves(server, number, size, address="127.0.0.1"):
    """Connections of clients that have sent `size` bytes of an upload, and send no more."""
    lines = ["POST /explain HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Content-Length: 1000000"]
    request = "\r\n".join([*lines, "", " " * size]).encode()
    bodies, before = server.page._bodies, server.page._bodies._bytes
    with ExitStack() as stack:
        sockets = []
        for _ in range(number):
            half = socket.create_connection(("127.0.0.1", server.port), timeout=60, source_address=(address, 0))
            sockets.append(stack.enter_context(half))
            half.sendall(request)
        wait_for(lambda: bodies._bytes == before + number * size)
        yield sockets


def answered(sockets):
    """The statuses of the responses that have come."""
    ready, _, _ = select.select(sockets, [], [], 0.1)
    return [int(half.recv(1000).split()[1]) for half in ready]


def test_slow_uploads_delay_nobody(server):
    with halves(server, 3, 10) as slow:
        assert server.ask("/explain", {"prompt": TEXT, "images": "none"})[0] == 200
        assert answered(slow) == []


def test_the_largest_upload_gives_way(server, monkeypatch):
    monkeypatch.setattr(bodies, "MAX_BYTES", 10_000)
    with halves(server, 1, 6_000) as large, halves(server, 1, 3_000) as small:
        assert server.ask("/explain", {"prompt": TEXT, "images": "none", "answers": "a" + 1_500 * " "})[0] == 200
        assert answered(large) == [429] and answered(small) == []


def test_uploads_take_no_room_from_the_api(server, monkeypatch):
    monkeypatch.setattr(bodies, "MAX_BYTES", 10_000)
    with halves(server, 1, 10_000) as full:
        assert server.ask("/v1/completions", {"prompt": TEXT, "max_tokens": 1})[0] == 200
        assert answered(full) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine")
def test_uploads_count_against_their_own_address(server, monkeypatch):
    monkeypatch.setattr(bodies, "MAX_BYTES", 10_000)
    with halves(server, 3, 3_000, "127.0.0.2") as slow:
        assert server.ask("/explain", {"prompt": TEXT + 4_000 * " ", "images": "none"})[0] == 200
        assert answered(slow) == [429]


def test_more_uploads_than_may_wait_are_told_so(server, decoding, monkeypatch):
    monkeypatch.setattr(server.engine, "max_waiting", 2)
    body = {"prompt": TEXT, "images": "uploaded", "uploads": [picture("a.png", Image.new("RGB", (40, 40)))], "k": 1}
    decoding.go.clear()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.ask, "/explain", body) for _ in range(4)]
        try:
            wait_for(lambda: server.page._open == 4)
            status, answer = server.ask("/explain", body)
        finally:
            decoding.go.set()
        assert [each.result()[0] for each in asked] == [200] * 4
    assert status == 429 and "4 requests of the page are already waiting: try again" in answer["error"]["message"]


def test_too_many_pixels_are_refused(server):
    large = picture("large.png", Image.new("1", (4096, 4100)))
    body = {"prompt": TEXT, "images": "uploaded", "k": 3, "uploads": [large] * 2}
    status, answer = server.ask("/explain", body)
    assert status == 400
    assert answer["error"]["message"] == (
        "the images have 33,587,200 pixels, at most 33,554,432 are allowed: use smaller images"
    )
    assert server.ask("/explain", body | {"k": 1})[0] == 200  # the first one alone
    wide = picture("wide.jpg", Image.new("L", (65000, 1040)))
    status, answer = server.ask("/explain", body | {"uploads": [wide]})
    assert status == 400 and "65000 x 1040 pixels, more than the 67,108,864 allowed" in answer["error"]["message"]


def test_a_jpeg_of_many_scans_is_not_decoded(server):
    """Each scan of 53 bytes takes as long as the whole image: 19,000 of them kept the thread for minutes."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG", progressive=True)
    scans = file.getvalue().count(b"\xff\xda")
    body = {"prompt": TEXT, "images": "uploaded", "k": 1}
    for more, status in ((100 - scans, 200), (101 - scans, 400)):
        data = base64.b64encode(file.getvalue() + more * b"\xff\xda").decode()
        answered, answer = server.ask("/explain", body | {"uploads": [{"name": "scans.jpg", "data": data}]})
        assert answered == status, answer
    assert "cannot read the image scans.jpg: a JPEG of more than 100 scans" in answer["error"]["message"]


def test_uploads_are_shrunk_as_they_are_read(server, decoding):
    photo, drawing = Image.new("RGB", (4000, 3000), "red"), Image.new("RGBA", (300, 2000), "blue")
    uploads = [picture("photo.jpg", photo), picture("drawing.png", drawing)]
    opened = page_module._opened([Upload(**upload) for upload in uploads])
    images = [page_module._small(*image)[1] for image in opened]
    assert decoding.sizes == [(1000, 750), (300, 2000)]
    assert [image.size for image in images] == [(1000, 750), (154, 1024)]
    assert images[1].getpixel((70, 500)) == (0, 0, 255)


def test_others_are_answered_while_uploads_are_decoded(server, decoding):
    uploads = [picture("a.png", Image.new("RGB", (40, 40)))] * 2
    decoding.go.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "/explain", {"prompt": TEXT, "images": "uploaded", "uploads": uploads, "k": 2})
        try:
            assert decoding.begun.acquire(timeout=60)
            assert server.ask("/v1/completions", {"prompt": TEXT, "max_tokens": 2})[0] == 200
        finally:
            decoding.go.set()
        assert asked.result()[0] == 200


def test_the_end_of_the_server_ends_the_decoding(server, decoding):
    uploads = [picture("a.png", Image.new("RGB", (40, 40)))] * 3
    decoding.go.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "/explain", {"prompt": TEXT, "images": "uploaded", "uploads": uploads, "k": 3})
        try:
            assert decoding.begun.acquire(timeout=60)
            server.engine.end()
        finally:
            decoding.go.set()
        status, answer = asked.result()
    assert status == 503 and answer["error"]["code"] == "server_stopping" and len(decoding.sizes) == 1


def test_a_client_that_has_gone_ends_the_decoding(server, decoding):
    uploads = [picture("a.png", Image.new("RGB", (40, 40)))] * 3
    body = json.dumps({"prompt": TEXT, "images": "uploaded", "uploads": uploads, "k": 3})
    decoding.go.clear()
    gone = http.client.HTTPConnection("127.0.0.1", server.port)
    gone.request("POST", "/explain", body, JSON)
    try:
        assert decoding.begun.acquire(timeout=60)
        gone.sock.close()
        gone.close()
        wait_for(lambda: server.metric('valm_requests_total{endpoint="explain",status="499"}') == 1)
    finally:
        decoding.go.set()
    assert server.ask("/explain", {"prompt": TEXT, "images": "none"})[0] == 200
    assert len(decoding.sizes) == 1 and not server.engine._open


@pytest.mark.slow
def test_the_page_in_a_browser(browser, server, tmp_path):
    """Every switch changes the page, on a desk and on a phone, and the browser asks this machine for everything."""
    from playwright.sync_api import expect

    Image.new("RGB", (40, 40), "green").save(tmp_path / "leaf.png")
    address = f"http://127.0.0.1:{server.port}/"
    requests, errors = [], []
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        explanation = page.locator("#explanation")

        def shows(*titles, explanation=explanation):
            expect(explanation.locator(".setting h2")).to_have_text(list(titles), timeout=60_000)

        page.locator("#prompt").fill(TEXT)
        page.locator("#prompt").press("Enter")
        expect(explanation.locator(".label").first).to_contain_text("Images of “the”", timeout=60_000)
        shows("valm, 3 retrieved images", "gpt2")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        expect(page.locator("#k")).to_be_visible(visible=width > 640)  # a phone begins with it folded
        if width < 640:
            page.get_by_text("More controls").click()
            expect(page.locator("#k")).to_be_visible()
        weights = explanation.locator("[data-cell]").all_inner_texts()
        explanation.locator("[data-heads]").first.select_option("1")
        assert explanation.locator("[data-cell]").all_inner_texts() != weights
        page.locator("#images").get_by_label("random").check()
        shows("valm, 3 retrieved images", "valm, 3 random images", "gpt2")
        page.locator("#images").get_by_label("none").check()
        shows("valm, 3 retrieved images", "valm, no images", "gpt2")
        page.locator("#uploads").set_input_files([tmp_path / "leaf.png"])
        shows("valm, 3 retrieved images", "valm, uploaded images", "gpt2")
        assert explanation.locator(".setting >> nth=1 >> .caption").all_inner_texts() == ["leaf.png"] * 3
        page.locator("#answers").fill(HOSTILE)
        page.locator("#run").click()
        expect(explanation.locator(".answers tbody th").first).to_have_text(HOSTILE, timeout=60_000)
        page.locator("#answers").fill("")
        page.locator("#prompt").fill(" ")
        page.locator("#run").click()
        error = page.locator("#error")
        expect(error).to_contain_text("the prompt is empty", timeout=60_000)
        assert 0 < error.bounding_box()["y"] - page.locator("#run").bounding_box()["y"] < 100  # below the button
        page.get_by_role("button", name="3. No images").click()
        shows("valm, 3 retrieved images", "valm, no images", "gpt2")
        expect(error).to_be_hidden()
        assert "without looking" in page.locator("#hint").inner_text()
        context.close()
    assert [message for message in errors if "400" not in message] == []
    outside = [url for url in requests if not url.startswith((address, "data:"))]
    assert outside == [] and len(requests) > 10
