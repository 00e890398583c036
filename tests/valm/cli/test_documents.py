"""Every command and Python example of README.md and docs/ is run, or at least understood."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

import valm
from studies.color.__main__ import build_parser as color_parser
from studies.color.questions import FLICKR_CAPTIONS, photographs
from studies.demo.__main__ import build_parser as demo_parser
from tests.valm.models import llama_of
from tests.valm.other_tokenizers import gpt2_like
from valm.cli import build_parser, main
from valm.errors import ValmError
from valm.model.augment import fusion_module
from valm.model.smollm2 import convert_smollm2
from valm.training import training_arguments

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "studies" / "color" / "plan.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSERS = {"valm ": build_parser, "python -m studies.demo ": demo_parser, "python -m studies.color ": color_parser}
TUTORIALS = ["attention", "search", "knowledge-base"]
PRETRAINED_CLIP = "ViT-B-32:laion2b_s34b_b79k"


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[str]:
    """The `valm` commands of a page, and those of studies; a line that ends in a backslash goes on in the next."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line.startswith(tuple(PARSERS))]


def write_configs(page: Path, folder: Path) -> None:
    """The YAML files of a page."""
    for config in blocks(page, "yaml"):
        named = re.match(r"# (\w+\.yaml)", config)
        assert named, f"{page.name}: a config begins with a comment that has its file's name"
        (folder / named[1]).write_text(config, encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_is_one(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_configs(page, tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands(page):
        start, parser = next((start, parser) for start, parser in PARSERS.items() if command.startswith(start))
        words = shlex.split(command.removeprefix(start), comments=True)
        words = [word for word in words if word not in ("…", "...")]
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}: {capsys.readouterr().err}")


@pytest.fixture
def workshop(world, tmp_path, monkeypatch):
    """A folder with what the pages name: PICTURES, CLIP, and later what their commands leave."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PICTURES").symlink_to(world / "pictures")
    (tmp_path / "CLIP").symlink_to(world / "clip")
    (tmp_path / "demo-output").symlink_to(world)
    return tmp_path


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name, workshop, capsys):
    page = ROOT / "docs" / "tutorials" / f"{name}.md"
    for command in commands(page):
        assert main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err}"
    code = "\n".join(blocks(page, "python"))
    assert code
    exec(compile(code, str(page), "exec"), {"__name__": name})


def write_photographs(folder: Path) -> None:
    """300 captioned photographs of Flickr8k where VALM_EVAL_DATA has them, else drawings of shapes."""
    folder.mkdir()
    data = os.environ.get("VALM_EVAL_DATA", "none")
    if captions := photographs(data):
        for name in list(captions)[:300]:
            shutil.copy(Path(data) / FLICKR_CAPTIONS.parent / "images" / name, folder)
            (folder / name).with_suffix(".txt").write_text("\n".join(captions[name]))
        return
    colors = ("red", "green", "blue", "yellow", "black", "white")
    for number in range(300):
        color, ground = colors[number % 6], colors[(number % 6 + 1 + number // 6 % 5) % 6]
        shape = ("ellipse", "rectangle")[number // 30 % 2]
        image = Image.new("RGB", (320, 240), ground)
        left, top = 10 + number % 97, 10 + number % 61
        getattr(ImageDraw.Draw(image), shape)((left, top, left + 120, top + 120), fill=color)
        image.save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"a {color} {shape} on a {ground} ground")


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M where its package is installed, else a tiny decoder."""
    try:
        convert_smollm2(folder)
    except ValmError:
        tokenizer = gpt2_like()
        llama_of(tokenizer, max_position_embeddings=512).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.mark.slow  # it trains CLIPs and models
@pytest.mark.timeout(5400)
def test_own_pictures(tmp_path):
    """The commands as they stand on the page; the folder of the pretrained CLIP's name is the CLIP of the first."""
    (tmp_path / PRETRAINED_CLIP).symlink_to("clip")
    write_photographs(tmp_path / "pictures")
    write_smollm2(tmp_path / "smollm2")
    (tmp_path / "photos").mkdir()  # without captions
    for image in sorted((tmp_path / "pictures").glob("*.jpg"))[:20]:
        shutil.copy(image, tmp_path / "photos")
    (tmp_path / "notes.txt").write_text("We saw a dog at the lake.\nThe boat was red.")
    seconds, page = {}, ROOT / "docs" / "tutorials" / "own-pictures.md"
    write_configs(page, tmp_path)
    for command in commands(page):
        begin = time.monotonic()
        words = shlex.split(command, comments=True)
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        seconds[command] = time.monotonic() - begin
        print(f"{seconds[command]:6.1f} s  {command}\n{done.stdout}")
        if words[1] == "generate":
            assert "  seen for: " in done.stdout
    print(f"{sum(seconds.values()):6.1f} s in all")
    assert (tmp_path / "smollm2.html").read_text().count("data:image/") > 1


@pytest.fixture
def own_model(workshop, world, base):
    """The workshop with what the README names: pictures, a decoder in the folder smollm2, and the examples, which train
    for three steps and ask one question."""
    shutil.copytree(ROOT / "examples", workshop / "examples")
    config = workshop / "examples" / "smollm2.yaml"
    fewer = {"context": 32, "steps": 3, "batch_size": 4}
    questions = workshop / "examples" / "questions.csv"
    questions.write_text("\n".join(questions.read_text(encoding="utf-8").splitlines()[:2]), encoding="utf-8")
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text(encoding="utf-8")) | fewer), encoding="utf-8")
    (workshop / "pictures").symlink_to(world / "pictures")
    (workshop / "smollm2").symlink_to(base)
    return workshop


@pytest.mark.slow  # it trains two models
def test_the_commands_and_examples_of_the_readme_run(own_model, capsys):
    for command in commands(ROOT / "README.md"):
        words = [*shlex.split(command)[1:], "--clip", "CLIP", "--steps", "3"]  # a CLIP takes minutes to train
        assert main(words) == 0, f"{command}: {capsys.readouterr().err}"
    assert (own_model / "out" / "report.html").is_file()
    examples = blocks(ROOT / "README.md", "python")
    assert examples
    exec(compile("\n".join(examples), "README.md", "exec"), {"__name__": "readme"})
    assert "A dog runs through the" in capsys.readouterr().out


def test_the_plan_of_the_page_on_training_goes_together(monkeypatch):
    """It would take too long to run, and what a plan runs is tested elsewhere."""
    checked = []

    def check(plan):
        plan.check()
        training_arguments(plan.out, **plan.training_fields())
        checked.append(plan)

    monkeypatch.setattr("valm.training.run.run_plan", check)
    (example,) = (code for code in blocks(ROOT / "docs" / "how-to" / "training.md", "python") if "TrainingPlan" in code)
    exec(compile(example, "training.md", "exec"), {})
    assert len(checked) == 1


def run_example(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def test_the_layer_of_the_examples_learns_from_images(monkeypatch, capsys):
    run_example(monkeypatch, "attention_layer")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-2] < 0.1 and losses[0] > 1.5 and losses[-1] > 1.5  # at the end, at the beginning, without images


def test_the_search_of_the_examples_is_exact(monkeypatch, tmp_path, capsys):
    for _ in range(2):  # the second time the index is there
        run_example(monkeypatch, "exact_search", str(tmp_path / "index"), "--rows", "2000")
        assert "the rows of a search in float64: True" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "exact_search", str(tmp_path / "index"), "--rows", "1000")
    assert "has 2000 rows, not 1000: choose another folder" in capsys.readouterr().err


def write_looking_model(world: Path, folder: Path) -> None:
    """The small model, which looks at its images: trained for three steps, it hardly does."""
    model, tokenizer = valm.load(world / "valm")
    with torch.no_grad():
        fusion_module(model).logit_bias_delta.fill_(4)
        model.transformer.h[model.fusion_options.layer].attn.c_proj.weight.mul_(20)
        model.transformer.ln_f.weight.mul_(20)
    valm.save_checkpoint(model, tokenizer, folder)


def test_images_are_switched_on_and_off_in_the_examples(monkeypatch, world, tmp_path, capsys):
    write_looking_model(world, tmp_path / "valm")
    run_example(monkeypatch, "images_on_and_off", str(tmp_path / "valm"), "--question", "the color of the sea is")
    found, *answers = capsys.readouterr().out.splitlines()
    assert found.startswith("images found: a ") and len(answers) == 3
    assert len({answer.split(":")[1] for answer in answers}) == 3
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        run_example(monkeypatch, "images_on_and_off", str(tmp_path / "nowhere"))


NOTEBOOK = json.loads((ROOT / "examples" / "ask_the_demo.ipynb").read_text(encoding="utf-8"))
CODE_CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    assert [(cell["outputs"], cell["execution_count"]) for cell in CODE_CELLS] == [([], None)] * len(CODE_CELLS)


@pytest.mark.slow  # it starts a process
def test_the_notebook_exchanges_images(world, tmp_path):
    write_looking_model(world, tmp_path / "demo-output" / "valm")
    (tmp_path / "demo-output" / "pictures" / "frog").mkdir(parents=True)
    Image.new("RGB", (40, 40), "green").save(tmp_path / "demo-output" / "pictures" / "frog" / "0.png")
    (tmp_path / "examples").mkdir()
    results = "[shares(found), shares(frogs), *map(answers, (found, frogs, text_only)), strip(found).size]"
    code = ["".join(cell["source"]) for cell in CODE_CELLS] + [f"import json\nprint(json.dumps({results}))"]
    run = [sys.executable, "-c", "\n\n".join(code)]
    done = subprocess.run(run, cwd=tmp_path / "examples", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, frogs, *answers, size = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 and all(caption.startswith("a ") for caption, _ in found)
    assert [caption for caption, _ in frogs] == ["0.png", "0.png"]
    assert 0.01 < sum(share for _, share in found) <= 1.001
    assert len({json.dumps(answer) for answer in answers}) == 3  # with the images, with frogs, without
    assert size == [80, 40]


def test_the_memory_of_the_examples_names_what_is_not_there(monkeypatch, tmp_path, capsys):
    for arguments, said in (((), "required: model, text"), ((str(tmp_path), "a.txt", "b.txt"), "there is no a.txt")):
        with pytest.raises(SystemExit):
            run_example(monkeypatch, "memory", *arguments)
        assert said in capsys.readouterr().err
