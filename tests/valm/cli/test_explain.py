import pytest
from PIL import Image

from tests.valm.cli.commands import run
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer

PROMPT = "the color of the apple is"


def test_explain_writes_a_page(world, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.symlink_to("there.html")
    assert run("explain", world / "valm", PROMPT, "--out", page) == 0
    text = page.read_text()
    assert "<h1><bdi>the color of the apple is</bdi>" in text and 'alt="a ' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "there.html"]
    assert page.is_symlink()
    assert str(page) in capsys.readouterr().out


def test_beside_it_stand_other_images_and_another_model(world, tmp_path):
    (tmp_path / "greens").mkdir()
    Image.new("RGB", (40, 40), "green").save(tmp_path / "greens" / "leaf.png")
    options = ["--replace", tmp_path / "greens", "--compare", world / "gpt2", "--answers", "red, green"]
    assert run("explain", world / "valm", PROMPT, "--out", tmp_path / "page.html", *options) == 0
    text = (tmp_path / "page.html").read_text()
    for title in ("valm", "valm, with images of greens", "gpt2"):
        assert f"<bdi>{title}</bdi></h2>" in text
    assert 'alt="leaf.png"' in text and "This model takes no images (K = 0)" in text
    assert text.count('<th scope="row"><bdi>green</bdi></th>') == 3


def test_two_models_of_one_name_are_told_apart(world, copy_of, tmp_path):
    other = copy_of("gpt2") / "gpt2"
    assert run("explain", world / "gpt2", PROMPT, "--out", tmp_path / "page.html", "--compare", other) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<bdi>gpt2</bdi></h2>" in text and f"<bdi>{tmp_path.name}/gpt2</bdi></h2>" in text


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    valm, gpt2, page = ["explain", "{world}/valm"], ["explain", "{world}/gpt2"], ["--out", "{tmp}/page.html"]
    return {
        "empty prompt": ([*valm, "", *page], "the prompt is empty"),
        "long prompt": ([*valm, "the apple " * 30, *page], "this model reads 32 at most"),
        "no retriever": (["explain", "{tmp}/alone", PROMPT, *page], "has no retriever: give it a knowledge base"),
        "another CLIP": ([*valm, PROMPT, "--clip", "{tmp}/clip", *page], "was built with the CLIP"),
        "no pictures": ([*valm, PROMPT, "--replace", "{tmp}/alone", *page], "no images in {tmp}/alone"),
        "nothing to replace": (
            [*gpt2, PROMPT, "--replace", "{world}/pictures", *page],
            "this model sees no images (K = 0), so there are none to replace",
        ),
        "no answer": ([*valm, PROMPT, "--answers", "red,,blue", *page], "the answer '' has no tokens"),
        "no such folder": ([*valm, PROMPT, "--out", "{tmp}/none/page.html"], "{tmp}/none"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, copy_of, name):
    arguments, expected = wrong_inputs()[name]
    root = copy_of("valm")
    (root / "valm").rename(root / "alone")
    (root / "alone" / "_retrieval.json").unlink()
    if "{tmp}/clip" in arguments:
        make_clip(prune_tokenizer(clip_tokenizer(), ["the color of the apple is"]), seed=5).save(root / "clip")
    sentence(arguments, expected)
    assert not (root / "page.html").exists()
