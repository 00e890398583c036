import pytest
from PIL import Image

from tests.valm.cli.commands import run, wrong_inputs
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer

PROMPT = "the color of the apple is"


def test_explain_writes_a_page(world, tmp_path, output_of):
    page = tmp_path / "page.html"
    page.symlink_to("there.html")
    assert str(page) in output_of("explain", world / "valm", PROMPT, "--out", page)
    text = page.read_text()
    assert "<h1><bdi>the color of the apple is</bdi>" in text and 'alt="a ' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "there.html"]
    assert page.is_symlink()


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


PAGE = " --out {tmp}/page.html "
VALM, GPT2 = f"explain {{world}}/valm '{PROMPT}'" + PAGE, f"explain {{world}}/gpt2 '{PROMPT}'" + PAGE


@wrong_inputs(
    {
        f"explain {{tmp}}/alone '{PROMPT}'" + PAGE: "has no retriever: give it a knowledge base",
        VALM + "--clip {tmp}/clip": "was built with the CLIP",
        VALM + "--replace {tmp}/alone": "no images in {tmp}/alone",
        VALM + "--answers red,,blue": "the answer '' has no tokens",
        VALM + "--out {tmp}/none/page.html": "{tmp}/none",
        GPT2 + "--replace {world}/pictures": "this model sees no images (K = 0), so there are none to replace",
    }
)
@pytest.mark.usefixtures("alone")
def test_wrong_input_is_one_sentence(sentence, tmp_path, command, message):
    if "{tmp}/clip" in command:
        make_clip(prune_tokenizer(clip_tokenizer(), [PROMPT]), seed=5).save(tmp_path / "clip")
    sentence(command, message)
    assert not (tmp_path / "page.html").exists()
