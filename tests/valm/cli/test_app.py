"""valm app: served on this machine alone, and wrong input in one sentence. What it shows: tests/valm/explain."""

import importlib.util
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

# Not imported here: that takes as long as all else together, in every process that collects these tests.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs the extra [app]")


def test_the_app_is_served_on_this_machine_alone(world, tmp_path, monkeypatch):
    """Under its own names only, and what was uploaded is gone when it is ended."""
    uploads = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    command = [sys.executable, "-m", "valm", "app", str(world / "valm"), "--compare", str(world / "gpt2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            with urllib.request.urlopen(address) as page:
                text = page.read().decode()
            with pytest.raises(urllib.error.HTTPError) as rebound:
                urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "attacker.example"}))
            refused = rebound.value.code
            body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nmine\r\n--x--\r\n'
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, headers)).read()
            assert [file.read_bytes() for file in uploads.rglob("*.png")] == [b"mine"]
        finally:
            process.terminate()
            status = process.wait(60)
    assert "valm · valm" in text
    assert refused == 400
    assert status == 0 and not [file for file in uploads.rglob("*") if file.is_file()]
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
@pytest.mark.usefixtures("alone")
def test_wrong_input_is_one_sentence(sentence, arguments, expected):
    sentence(arguments, expected)


def test_a_taken_port_is_one_sentence(sentence):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        sentence(["app", "{world}/valm", "--port", port], "the app cannot be served at 127.0.0.1")
