"""The app: what it computes, and all of it in a real browser."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from valm.errors import ValmError
from valm.explain.explanation import explain

TEXT = "a red apple lies on the"
# Gradio fills templates of both kinds, though not in what it is given to show.
HOSTILE = "<b>${1}</b>{{x}}`"


@pytest.fixture
def app(model, tokenizer, make_model):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    from valm.explain.app import App

    return App("valm", model, tokenizer, ("gpt2", make_model(0), tokenizer))


def ask(app, images="retrieved", k=3, uploads=None, answers="", beside=(), prompt=TEXT):
    return app.explain(prompt, images, k, uploads, answers, beside)


def test_the_switches_change_what_is_explained(app, model, tokenizer):
    own = explain(model, tokenizer, TEXT)
    (retrieved,) = ask(app).values()
    np.testing.assert_array_equal(retrieved.image_weights, own.image_weights)
    (five,) = ask(app, k=5).values()
    assert five.image_weights.shape[-1] == 5 and five.images_of(-1)[:3] == own.images_of(-1)
    (random,) = ask(app, images="random").values()
    assert [image.caption for image in random.images] != [image.caption for image in own.images]
    (none,) = ask(app, images="none").values()
    assert "switched off" in none.note and not np.allclose(none.probabilities, own.probabilities)


def test_uploaded_images_take_the_place_of_the_retrieved(app, tmp_path):
    Image.new("RGB", (40, 40), "green").save(tmp_path / "my leaf.png")
    (uploaded,) = ask(app, images="uploaded", uploads=[str(tmp_path / "my leaf.png")]).values()
    assert {image.caption for image in uploaded.images} == {"my leaf.png"}


def test_what_stands_beside_it(app):
    shown = ask(app, images="random", beside=["retrieved", "gpt2"], answers="red, blue")
    assert list(shown) == ["valm, 3 retrieved images", "valm, 3 random images", "gpt2"]
    assert {explanation.answers for explanation in shown.values()} == {("red", "blue")}
    assert list(ask(app, beside=["retrieved"])) == ["valm, 3 retrieved images"]


def test_models_have_the_switches_that_they_can_have(app, make_model, tokenizer):
    from valm.explain.app import App

    assert app.choices == ["retrieved", "random", "uploaded", "none"]
    blind = App("blind", make_model(1, blind=True), tokenizer)
    assert blind.choices == ["its own query (blind)", "none"]
    (shown,) = ask(blind, images=blind.choices[0]).values()
    assert "blind" in shown.note
    assert App("gpt2", make_model(0), tokenizer).choices == ["none"]
    lost = make_model()
    lost.set_retriever(None)
    with pytest.raises(ValmError, match=r"has no retriever: give it a knowledge base \(--kb\)"):
        App("lost", lost, tokenizer)


def test_wrong_input_is_one_sentence(app, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for arguments, sentence in (
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "red " * 30}, "this model reads 24 at most"),
        ({"images": "uploaded"}, "no uploaded images yet"),
        ({"images": "uploaded", "uploads": [str(tmp_path / "a.png")]}, "cannot read the image a.png"),
        ({"prompt": "red " * 10_000}, "the prompt has 40,000 characters, and the app takes 20,000 at most"),
        ({"answers": "red, " * 1_000}, "the list of answers has 5,000 characters, and the app takes 2,000 at most"),
        ({"k": 10**9}, "K is 1000000000, expected 1 to"),
        ({"k": 0}, "K is 0, expected 1 to"),
        ({"answers": "red,,blue"}, "the answer &#x27;&#x27; has no tokens"),
    ):
        usual = {"prompt": TEXT, "images": "retrieved", "k": 3, "uploads": None, "answers": "", "beside": ()}
        explanation, shown = app.show(0, *(usual | arguments).values())
        assert explanation == "" and sentence in shown and shown.count("<p") == 1 and 'role="alert"' in shown


def test_a_panic_of_the_tokenizer_is_one_sentence(app, monkeypatch):
    endless = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    endless.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    monkeypatch.setattr(app, "explain", lambda prompt: endless.encode(prompt))
    assert "a tokenizer stopped; its tokenizer.json is damaged" in app.show(0, "a" * 200 + "b")[1]


def test_without_gradio_there_is_one_sentence(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValmError, match=r"gradio.*pip install -e '.\[app\]'"):
        app.blocks()


def test_nothing_is_reported():
    """In a process of its own: the switches must stand before Gradio is imported, whatever the environment says."""
    pytest.importorskip("gradio", reason="needs the extra [app]")
    code = """
import json, valm.explain.app, gradio, gradio.analytics
from huggingface_hub import constants
print(json.dumps([gradio.analytics.analytics_enabled(), constants.HF_HUB_DISABLE_TELEMETRY]))
"""
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "True", "HF_HUB_DISABLE_TELEMETRY": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == [False, True]


@pytest.fixture
def served(app, monkeypatch):
    """The app on a free port, though the environment asks for all networks and a public link."""
    from valm.explain.app import launch

    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    asked = set()

    def asked_for(host, *arguments, real=socket.getaddrinfo, **options):
        asked.add(host)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", asked_for)
    blocks = launch(app)
    yield blocks
    blocks.close()
    assert asked <= {"127.0.0.1", "localhost", b"127.0.0.1", b"localhost", None}  # of all machines


def test_it_is_served_on_this_machine_alone(served):
    assert served.local_url.startswith("http://127.0.0.1:") and served.share_url is None
    with urllib.request.urlopen(served.local_url) as page:
        assert "valm · valm" in page.read().decode()


def test_pages_elsewhere_upload_nothing(served):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\na\r\n--x--\r\n'
    statuses = {}
    for origin in (None, served.local_url.rstrip("/"), "http://localhost:7860", "http://evil.example", "null"):
        headers = {"Content-Type": "multipart/form-data; boundary=x"} | ({"Origin": origin} if origin else {})
        request = urllib.request.Request(f"{served.local_url}gradio_api/upload", body, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                statuses[origin] = answer.status
        except urllib.error.HTTPError as error:
            statuses[origin] = error.code
    assert list(statuses.values()) == [200, 200, 200, 403, 403]


@pytest.mark.slow
def test_the_app_in_a_browser(browser, served, tmp_path):
    """Every switch changes the page, on a desk and on a phone, and the browser asks this machine for everything."""
    from playwright.sync_api import expect

    Image.new("RGB", (40, 40), "green").save(tmp_path / "leaf.png")
    requests, errors = [], []
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(served.local_url)
        explanation = page.locator("#explanation")

        def shows(*titles, explanation=explanation):
            expect(explanation.locator(".setting h2")).to_have_text(list(titles), timeout=60_000)

        page.locator("#prompt textarea").fill(TEXT)
        page.locator("#run").click()
        expect(explanation.locator(".label").first).to_contain_text("Images of “the”", timeout=60_000)
        shows("valm, 3 retrieved images", "gpt2")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        expect(page.locator("#k")).to_be_visible(visible=width > 640)  # a phone begins with it folded
        if width < 640:
            page.get_by_role("button", name="More controls").click()
            expect(page.locator("#k")).to_be_visible()
        background = page.evaluate("getComputedStyle(document.querySelector('#explanation .answers th')).color")
        assert (background == "rgb(228, 231, 235)") == (scheme == "dark")
        page.locator("#images").get_by_label("random").check()
        shows("valm, 3 retrieved images", "valm, 3 random images", "gpt2")
        page.locator("#images").get_by_label("none").check()
        shows("valm, 3 retrieved images", "valm, no images", "gpt2")
        page.locator("#uploads input[type=file]").set_input_files(list(tmp_path.iterdir()))
        shows("valm, 3 retrieved images", "valm, uploaded images", "gpt2")
        assert explanation.locator(".setting >> nth=1 >> .caption").all_inner_texts() == ["leaf.png"] * 3
        page.locator("#answers textarea").fill(HOSTILE)
        page.locator("#run").click()
        expect(explanation.locator(".answers tbody th").first).to_have_text(HOSTILE, timeout=60_000)
        page.locator("#answers textarea").fill("")
        page.locator("#prompt textarea").fill(" ")
        page.locator("#run").click()
        error = page.locator("#error")
        expect(error).to_contain_text("the prompt is empty", timeout=60_000)
        assert 0 < error.bounding_box()["y"] - page.locator("#run").bounding_box()["y"] < 100  # below the button
        page.get_by_role("button", name="3. No images").click()
        shows("valm, 3 retrieved images", "valm, no images", "gpt2")
        expect(error).to_be_hidden()
        assert "without looking" in page.locator("#hint").inner_text()
        context.close()
    assert errors == []
    outside = [url for url in requests if not url.startswith((served.local_url, "data:", "blob:"))]
    assert outside == [] and len(requests) > 10
