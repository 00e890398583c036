"""A whole study of tiny models: every stage, killed and gone on, and what its results say."""

import dataclasses
import itertools
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

import valm
from studies.color import run, seed_scores
from studies.color.comparisons import ALL_OF_PEOPLE, VALIDATION_OBJECTS, learned
from studies.color.config import ARMS, DOSES, EXCHANGES, read_config
from studies.color.results import PEOPLE, PEOPLE_SETS, read_results
from studies.color.run import as_options, run_study
from studies.color.study import Study
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.models import llama_of
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.tiny_clip import TINY
from valm.cli import main
from valm.errors import ValmError
from valm.evaluation.questions import COLORS as COLOR_WORDS
from valm.evaluation.questions import FAIR, Questions
from valm.evaluation.sets import load_memory_color
from valm.store.files import write_json

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 160, 20), "yellow": (240, 220, 20)}
THINGS = ["kettle", "bucket", "ladder", "hammer", "pencil", "wallet", "banjo", "violin", "canoe", "tractor"]
THINGS += ["apple", "sky"]  # items of the test sets


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures of things in one colour each, test sets, and a tiny language model."""
    root = tmp_path_factory.mktemp("study")
    (root / "pictures").mkdir()
    for number, thing in enumerate(THINGS):
        image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((8, 8, 64, 64), fill=(*list(COLORS.values())[number % 4], 255))
        image.save(root / "pictures" / f"{thing}.png")
    write_sets(root / "data")
    training = {"sub": "chair", "obj": "brown"}
    (root / "data/vicomte/color_single_train.jsonl").write_text(json.dumps(training))
    tokenizer = gpt2_like()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    llama_of(tokenizer, max_position_embeddings=512, **ids).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "clip.json").write_text(json.dumps({"model_cfg": TINY}))
    study = {
        "name": "tiny",
        "language_model": str(root / "model"),
        "pictures": {"things": {"folder": str(root / "pictures")}},
        "clip": {"model": str(root / "clip.json"), "steps": 2, "batch_size": 8},
        "text": {"templates": {"count": 30}},
        # numbers as YAML has them
        "training": {
            "steps": 2,
            "batch_size": 4,
            "lr": "1e-2",
            "logit_bias": 0,
            "limit_softmax": True,
            "min_score": "auto",
        },
        "curve": [1, 2],
        "arms": list(ARMS),
        "tests": ["validation", "memory_color", "color_terms", "heldout"],
        "images": 2,
        "seeds": [3],
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    return root


def study_of(world, command=main, **options):
    return Study(read_config(world / "study.yaml"), world / "out", command, world / "data", progress=False, **options)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_whole_study(world):
    def killed(line):
        if line[0] == "train" and line[line.index("--out") + 1].endswith("/control-1"):
            raise KeyboardInterrupt
        return main(line)

    with pytest.raises(KeyboardInterrupt):
        run_study(study_of(world, killed))
    lines = []
    files = run_study(study_of(world, lambda line: lines.append(line) or main(line)))
    assert [line[:2] for line in lines] == [["train", "--base"]]  # all else was finished
    assert "--min-score" in lines[0] and lines[0][lines[0].index("--steps") + 1] == "1"
    assert lines[0][lines[0].index("--twin") + 1] == "blind"
    assert list(files) == [3]
    assert run_study(study_of(world, lambda line: pytest.fail("all was finished"))) == files

    results = read_results(files.values())
    assert {row.of for row in results.rows} == {"validation", *PEOPLE_SETS, PEOPLE}
    of_curve = {("valm-1", "retrieved"), ("control-1", "retrieved")}
    assert set(results.arms) == {(name, images) for name in ARMS for images in ARMS[name].tests} | of_curve
    assert {row.measure for row in results.rows if row.arm in of_curve}.isdisjoint({"nats", *EXCHANGES})
    assert {row.of for row in results.rows if row.arm in of_curve} == {"validation", *PEOPLE_SETS, PEOPLE}
    for items in (VALIDATION_OBJECTS, ALL_OF_PEOPLE):
        assert len(learned(results, items).seeds) == 1
    doses = {(of, images) for (_, images), of in ((row.arm, row.of) for row in results.rows) if images in DOSES}
    assert {of for of, _ in doses} == {*PEOPLE_SETS, PEOPLE}
    tables = [(world / f"out/pictures/seed-3-{dose}.csv").read_text().splitlines() for dose in DOSES]
    assert all(set(fewer) <= set(more) for more, fewer in itertools.pairwise(tables))
    # hidden states of what is trained on, and of questions, alone and behind captions
    assert len(list((world / "out/below").iterdir())) == 3
    assert EXCHANGES[0] in {row.measure for row in results.rows}
    answers = next(row for file in (world / "out/seed-3/scores").glob("valm-*") for row in json.loads(file.read_text()))
    assert [answers[name] for name in ("images", "of", "measure")] == ["retrieved", "validation", "raw"]
    asked = {(row.of, row.measure): row.asked for row in results.rows}
    things = {item.text: item.answer for item in load_memory_color(world / "out/seed-3/text/validation.csv")}
    assert dict(zip(*asked["validation", "raw"][:3:2], strict=True)) == things
    right = np.array(answers["answers"]) == [[COLOR_WORDS.index(color)] for color in things.values()]
    assert results.accuracy(("valm", "retrieved"), "validation").value == pytest.approx(right.mean())
    items = asked["memory_color", "raw"]
    pictured = {"banana": False, "apple": True, "sky": True, "cloud": False}
    assert dict(zip(items.items, items.pictured, strict=True)) == pictured
    assert items.pixels.tolist() == ["", "green", "yellow", ""]
    assert results.difference(("valm", "retrieved"), ("valm", "taken-out"), "memory_color")
    stages = set(results.seeds[0]["seconds"])
    assert stages >= {"text", "clip", "kb-others", "kb", "retrieval-train", "valm"}
    assert any(stage.startswith("scores of valm") for stage in stages)

    for name in ("valm", "control-1"):
        model, tokenizer = valm.load(world / "out/seed-3" / name)
        if name == "valm":
            assert model.finder.source.knowledge_base.name == "kb-others"  # that it was trained with
        ids = tokenizer("The color of the sky is", return_tensors="pt").input_ids
        assert torch.isfinite(model(ids).logits).all()
    (world / "object_color").mkdir()
    table = "Index,Descriptor,Item,Color\n1,the,kettle,red\n2,an,apple,green\n"
    (world / "object_color" / "memory_color_data.csv").write_text(table)
    folders = [str(world / "out/seed-3" / name) for name in ("valm", "control")]
    assert main(["eval", *folders, "--tasks", "memory_color", "--data", str(world)]) == 0


def test_a_folder_with_another_recipe_is_refused(world, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"recipe": "other", "config": {"images": 3}, "sources": []}))
    study = study_of(world)
    with pytest.raises(ValmError, match="holds another study: its "):
        run_study(Study(study.config, tmp_path, main, study.data))
    with pytest.raises(ValmError, match="no seed 7, only 3"):
        run_study(study, [7])


@pytest.fixture
def asked(world, tmp_path, monkeypatch):
    """Runs studies of other tests in one folder, whose arms are asked nothing; returns the arms that were asked."""
    for name in ("_make_pictures", "language_model", "_write_text", "_prepare", "_train"):
        monkeypatch.setattr(run, name, lambda *arguments: None)
    monkeypatch.setattr(run, "read_pictures", lambda folder: [])
    monkeypatch.setattr(seed_scores, "_heldout", lambda folder, data: {})
    monkeypatch.setattr(seed_scores.Scoring, "things", [])
    lacking, lines, contents = set(), [], {}

    def questions(name):
        return Questions(name, FAIR, (contents.get(name, "a thing"),), ("?",), (("?",),), ("red", "blue"), ((0,),))

    monkeypatch.setattr(seed_scores, "validation_questions", lambda things: questions("validation"))
    monkeypatch.setattr(seed_scores, "set_questions", lambda name, data: questions(name))
    monkeypatch.setattr(seed_scores, "find_file", lambda name, data: None if name in lacking else name)

    def write(scoring, arm, file):
        lines.append(arm)
        sets = [name for name in scoring.study.tests if name not in scoring.missing]
        write_json(file, [{"arm": arm, "set": name} for name in sets])

    def results(scoring, rows):
        return {"rows": [row for one in rows.values() for row in json.loads(one.read_text())]}

    monkeypatch.setattr(seed_scores.Scoring, "write", write)
    monkeypatch.setattr(seed_scores.Scoring, "results", results)

    def ask(*tests, arms=("valm", "control")):
        config = dataclasses.replace(read_config(world / "study.yaml"), tests=tests, arms=arms, curve=())
        (file,) = run_study(Study(config, tmp_path, main, world / "data", progress=False)).values()
        rows = json.loads(file.read_text())["rows"]
        assert [row["arm"] for row in rows] == [arm for arm in arms for _ in range(len(rows) // len(arms))]
        found = list(lines)
        lines.clear()
        return {row["set"] for row in rows}, found

    return SimpleNamespace(ask=ask, lacking=lacking, contents=contents, folder=tmp_path, write=write)


def test_what_was_asked_is_not_asked_again_unless_its_set_has_other_contents(asked):
    first, second = ("validation", "memory_color"), ("validation", "color_terms")
    assert asked.ask(*first) == (set(first), ["valm", "control"])
    assert asked.ask(*second) == (set(second), ["valm", "control"])
    for arms in (("valm", "control"), ("valm",)):
        assert asked.ask(*first, arms=arms) == (set(first), [])
    asked.contents["memory_color"] = "another thing"
    assert asked.ask(*first)[1] == ["valm", "control"]
    del asked.contents["memory_color"]
    assert asked.ask(*first)[1] == []


def test_a_set_that_arrives_later_is_asked_of_every_arm(asked, monkeypatch):
    asked.lacking.add("object_shape")
    assert asked.ask("validation", "object_shape")[0] == {"validation"}
    assert asked.ask("validation", "object_shape")[1] == []

    def killed(scoring, arm, file):
        asked.write(scoring, arm, file) if arm == "valm" else pytest.fail("killed")

    with monkeypatch.context() as patched:
        patched.setattr(seed_scores.Scoring, "write", killed)
        with pytest.raises(pytest.fail.Exception):
            asked.ask("validation", "memory_color", "object_shape")
    asked.lacking.clear()
    both = {"validation", "object_shape"}
    assert asked.ask(*sorted(both, reverse=True)) == (both, ["valm", "valm", "control"])
    sets, arms = asked.ask("validation", "memory_color", "object_shape")
    assert sets == {*both, "memory_color"} and arms == ["valm", "control"]


def test_other_code_in_one_folder_is_noted(asked, monkeypatch):
    def noted():
        asked.ask("validation")
        return json.loads((asked.folder / "study.json").read_text())["sources"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (own,) = noted()
        assert own == run.sources_hash() and noted() == [own]
    monkeypatch.setattr(run, "sources_hash", lambda: "other")
    with pytest.warns(UserWarning, match="other code than today's"):
        assert noted() == [own, "other"]


def test_a_stage_that_fails_is_named(world, tmp_path):
    with pytest.raises(ValmError, match="this stage of the study failed: valm kb build"):
        study_of(world, lambda line: 1).valm("kb", "build", tmp_path)


def test_validation_asks_no_test_set(world):
    assert study_of(world, validation=True).tests == ["validation", "heldout"]


def test_settings_become_options():
    settings = {"batch_size": 24, "limit_softmax": True, "lr_scheduler_type": "cosine", "logit_bias": -3}
    settings |= {"cache_images": False}
    expected = "--batch-size 24 --limit-softmax --lr_scheduler_type cosine --logit-bias -3"
    assert as_options(settings) == expected.split()
