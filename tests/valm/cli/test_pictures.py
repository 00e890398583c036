"""valm pictures: wrong input, and commands that open the folder it makes."""

import json

import pytest

import valm
from tests.valm.cli.commands import run, wrong_inputs
from valm.errors import ValmError


@pytest.fixture
def made(copy_of, base):
    """{tmp}: a folder as of valm pictures, its parts copied from the world."""
    root = copy_of("valm", "gpt2", "kb", "base-retrieval", "clip")
    parts = {"model": "valm", "control": "gpt2", "kb": "kb", "retrieval": "base-retrieval"}
    about = {"format": "valm pictures", "version": 1, "parts": parts, "settings": {"--model": "llama"}}
    (root / "pictures.json").write_text(json.dumps(about))
    (root / "stages.json").write_text(json.dumps(dict.fromkeys(parts, 1.0)))
    return root


def test_commands_find_the_model_the_control_and_the_knowledge_base(made, world, output_of):
    model, _ = valm.load(made)
    assert model.name_or_path == str(made / "valm") and model.retriever.kb.path == made / "kb"
    assert "the color of the sea is" in output_of("generate", made, "the color of the sea is", "--max-new-tokens", 2)
    page = made / "page.html"
    assert "page:" in output_of("explain", made, "the color of the sea is", "--out", page)
    assert f">{made.name}<" in page.read_text() and ">gpt2<" in page.read_text()
    table = output_of("eval", made, "--tasks", "memory_color", "--data", world / "sets", "--protocol", "fair")
    assert f"| {made.name} |" in table and f"| {made.name}, gpt2 |" in table
    assert "6 images" in output_of("kb", "info", made)
    checked = output_of("verify", made)
    assert "all 6 images are as they were written" in checked and "all 6 documents are" in checked


def test_serve_finds_the_control(made, monkeypatch):
    served = {}

    def serve(name, model, tokenizer, **options):
        served.update(options)
        raise ValmError("served")  # the command ends its process after a server

    monkeypatch.setattr("valm.serving.server.serve", serve)
    assert run("serve", made) == 1
    assert served["other"][0] == "gpt2"


def test_train_names_the_base(made, sentence):
    sentence(
        "train {world}/corpus.txt --base {tmp} --kb {world}/kb --out {tmp}/new",
        "sees pictures already: give a decoder, such as its llama",
    )


@wrong_inputs(
    {
        "pictures {tmp}/none --model {world}/base --out {tmp}/out": "none",
        "pictures {tmp} --model {world}/base --out {tmp}/out": "no images in {tmp}",
        "pictures {world}/pictures --model {world}/base --out {tmp}/out --captions {tmp}/none.csv": (
            "--captions: there is no {tmp}/none.csv"
        ),
        "pictures {world}/pictures --model {world}/base --out {tmp}/out --steps 0": "--steps is 0, expected at least 1",
        "pictures {world}/pictures --model {world}/none --out {tmp}/out": "none",
        "pictures {world}/pictures --model {world}/base --out {world}/kb": "is not empty",
    }
)
def test_wrong_input_is_one_sentence(base, sentence, command, message):
    sentence(command, message)
