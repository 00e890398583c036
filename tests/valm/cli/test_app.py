"""valm app: served on this machine alone, and wrong input in one sentence. What it shows: tests/valm/explain."""

import re
import socket
import subprocess
import sys
import urllib.request

import pytest

pytest.importorskip("gradio", reason="needs the extra [app]")


def test_the_app_is_served_on_this_machine_alone(world):
    command = [sys.executable, "-m", "valm", "app", str(world / "valm"), "--compare", str(world / "gpt2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            with urllib.request.urlopen(address) as page:
                text = page.read().decode()
        finally:
            process.terminate()
    assert "valm · valm" in text
    sources = re.findall(r"(?:src|href)=\"(//|https?:)", text)
    assert sources == []


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["app", "{tmp}/alone"], "the model alone takes 2 images a token, but has no retriever"),
        (["app", "{world}/valm", "--kb", "{tmp}/none"], "{tmp}/none"),
        (["app", "{world}/valm", "--compare", "{tmp}/none"], "no checkpoint folder {tmp}/none"),
    ],
)
def test_wrong_input_is_one_sentence(sentence, copy_of, arguments, expected):
    root = copy_of("valm")
    (root / "valm").rename(root / "alone")
    (root / "alone" / "retrieval.json").unlink()
    sentence(arguments, expected)


def test_a_taken_port_is_one_sentence(sentence):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        sentence(["app", "{world}/valm", "--port", port], "the app cannot be served at 127.0.0.1")
