"""The budget of a seed, counted by hand. test_run.py writes the budget of a whole study."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from studies.color.__main__ import build_parser
from studies.color.budget import (
    Images,
    color_probe,
    finished_seeds,
    retrieved_images,
    shares_of_images,
    write_budget,
)
from studies.color.captions import last_images
from studies.color.conditions import Conditions
from studies.color.config import StudyConfig
from studies.color.pictures import Picture
from studies.color.questions import validation_questions
from studies.color.report import BUDGET_ROWS, budget, budget_table
from studies.color.results import read_results
from tests.studies.color import synthetic
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.other_tokenizers import gpt2_like
from valm.cli import run_command
from valm.errors import ValmError
from valm.evaluation.sets import Item
from valm.store.files import write_json

CONFIG = {"name": "tiny", "language_model": "model", "pictures": {"openmoji": {}}, "clip": {"steps": 2}, "text": {}}
CONFIG |= {"training": {"steps": 2}, "seeds": [3, 4, 5]}
# Colours are axes of the vectors.
AXES = ("red", "blue", "green")


class Axis:
    """A probe that names the longest axis of a vector."""

    def predict(self, vectors):
        return np.array(AXES)[vectors.argmax(-1)]


def picture(thing, color, number=0):
    return Picture(f"drawn/{thing}-{number}.png", thing, "drawn", thing, color, None)


def vector(**lengths):
    return [float(lengths.get(color, 0)) for color in AXES]


# Four questions with two images each: the score, whether it shows the object, the colour of its pixels, its vector.
QUESTIONS = [
    ("red", (0.9, True, "red", vector(red=1)), (0.8, True, "blue", vector(red=1, blue=0.5))),
    ("blue", (0.7, False, None, vector(green=1)), (0.4, True, "blue", vector(blue=3))),
    ("green", (0.6, False, "red", vector(green=1)), (0.5, False, None, vector(red=5))),
    ("red", (0.3, True, None, vector(blue=1)), (0.2, True, None, vector(red=2))),
]
ANSWERS = np.array([answer for answer, *_ in QUESTIONS])
SCORES, OWN, COLORS, VECTORS = ([[image[part] for image in images] for _, *images in QUESTIONS] for part in range(4))
IMAGES = Images(np.array(OWN), COLORS, np.array(SCORES, np.float32), np.array(VECTORS, np.float32))


def test_every_share_is_counted():
    assert shares_of_images(ANSWERS, IMAGES, 0.5, Axis()) == {
        "retrieved": 3 / 4,  # not the third
        "seen": 2 / 4,  # nor the last, whose scores are below the threshold
        "own_above": 1 / 4,  # nor the second, whose own image is below it
        "pixels": 2 / 4,  # the first, where red and blue tie, and the second
        "probe_of_best": 2 / 4,  # of the first and the third
        "probe_of_mean": 3 / 4,  # not the third, whose mean is red
        "probe_of_mean_above": 1 / 4,  # the first; the second is green, the third red, the last has no vector
    }


def test_without_a_threshold_its_rows_are_left_out():
    shares = shares_of_images(ANSWERS, IMAGES, None, Axis())
    assert set(shares) == {"retrieved", "pixels", "probe_of_best", "probe_of_mean"}


def test_an_image_that_was_not_found_is_in_no_mean():
    scores = np.array([[0.9, -np.inf], [-np.inf, -np.inf]], np.float32)
    vectors = np.array([[vector(red=1), vector(blue=9)], [vector(red=1), vector(red=1)]], np.float32)
    images = Images(np.zeros((2, 2), bool), [[None, None]] * 2, scores, vectors)
    shares = shares_of_images(np.array(["red", "red"]), images, 0.5, Axis())
    assert {shares[row] for row in ("probe_of_best", "probe_of_mean", "probe_of_mean_above")} == {0.5}


def kb_of(pictures, vectors):
    """What `Conditions` asks of a knowledge base of these pictures."""
    items = [SimpleNamespace(uri=picture.file) for picture in pictures]
    vectors = np.array(vectors, np.float16)
    return SimpleNamespace(item=items.__getitem__, gather=vectors.__getitem__)


@pytest.fixture
def conditions():
    """Two pictures of each of nine objects, in three colours that are axes of the vectors, and two others."""
    pictures = [picture(f"gizmo{number}", AXES[number % 3], view) for number in range(9) for view in range(2)]
    vectors = [vector(**{one.color: 1 + view / 10}) for view, one in enumerate(pictures)]
    pictures += [picture("banana", "red"), picture("apple", None)]
    found = object.__new__(Conditions)
    found.__dict__ |= {"shown": pictures, "kb": kb_of(pictures, [*vectors, vector(blue=1), vector(blue=1)])}
    return found


def test_a_probe_of_separable_colours_is_always_right(conditions):
    pytest.importorskip("sklearn")
    probe, count = color_probe(conditions, {f"gizmo{number}": "" for number in range(9)} | {"apple": ""})
    assert count == 18  # not the banana, which is no object to train on, nor the apple without a colour
    assert probe.predict(np.eye(3, dtype=np.float32) * 2).tolist() == list(AXES)
    right = shares_of_images(np.array(AXES), IMAGES_OF_AXES, None, probe)
    assert (right["probe_of_best"], right["probe_of_mean"]) == (1, 1)


IMAGES_OF_AXES = Images(np.ones((3, 2), bool), [[None] * 2] * 3, np.ones((3, 2)), np.eye(3)[:, None].repeat(2, 1))


def test_too_few_objects_train_no_probe(conditions):
    with pytest.raises(ValmError, match="2 objects cannot train a probe of colours: add sources of pictures"):
        color_probe(conditions, {"gizmo0": "", "gizmo1": ""})


class Finder:
    """A retriever: each token finds the image with its id and no second image, with the score of its position."""

    k = 2

    def __init__(self):
        self.encoder = SimpleNamespace(tokenizer=gpt2_like())

    def find(self, ids, mask):
        place = mask.cumsum(1) - 1
        return torch.stack([ids, torch.full_like(ids, -1)], -1), torch.stack([place, place - torch.inf], -1).float()


def test_the_images_are_those_of_the_last_token():
    finder = Finder()
    texts = ["the color of a banana is", "a banana"]
    rows = [finder.encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids, scores = last_images(texts, finder)
    assert ids.tolist() == [[row[-1], -1] for row in rows]
    assert scores.tolist() == [[len(row), -torch.inf] for row in rows]


def test_an_object_is_found_by_the_captions_of_its_pictures(conditions, monkeypatch):
    """The banana's picture is image 18, "bananas" its second one."""
    conditions.shown.append(picture("bananas", "yellow"))
    conditions.kb.gather = lambda ids: np.array(ids, np.float16)[:, None]
    conditions._made = {"retrieved": None}
    asked = validation_questions([Item("banana", "yellow", "a"), Item("apple", "red", "an")])
    prompts = len(asked.texts[0])
    ids = torch.tensor([[18, 20]] * prompts + [[18, -1]] * prompts)
    monkeypatch.setattr("studies.color.budget.last_images", lambda texts, _: (ids, ids.float()))
    images = retrieved_images(asked, conditions)
    assert images.own.tolist() == [[True, True]] * prompts + [[False, False]] * prompts
    assert images.colors == [["red", "yellow"]] * prompts + [["red", None]] * prompts
    assert images.vectors[:, :, 0].tolist() == ids.clamp(min=0).tolist()


def budget_of(seed, **shares):
    shares = dict.fromkeys(BUDGET_ROWS) | shares
    return {"recipe": "abc", "seed": seed, "arm": "cut", "images": 4, "questions": 819, "shares": shares}


def test_the_table_has_a_row_for_each_share_that_a_seed_has():
    lines = budget_table([budget_of(3, retrieved=0.5, mixed=0.25), budget_of(4, retrieved=1.0)]).splitlines()
    assert lines == [
        "| Questions about validation objects | seed 3, % of 819 questions | seed 4, % of 819 questions |",
        "| --- | --- | --- |",
        "| one of the 4 images of the token before the answer shows the object | 50.0 | 100.0 |",
        "| VaLM with a score threshold: the weights mixed with the base model's, as in the study, answer correctly "
        "| 25.0 | – |",
    ]


def test_a_page_shows_the_budgets_next_to_the_results(tmp_path):
    files = synthetic.write(tmp_path)
    assert budget(read_results(files)) == "No seed has a budget."
    write_json(tmp_path / "budget-seed-1.json", budget_of(1, retrieved=0.5))
    assert budget(read_results(files)) == budget_table([budget_of(1, retrieved=0.5)])
    write_json(tmp_path / "budget-seed-1.json", budget_of(2, retrieved=0.5))
    with pytest.raises(ValmError, match=r"the budget .*budget-seed-1.json is another seed's or study's: write it"):
        read_results(files)


@pytest.fixture
def out(tmp_path):
    """A study whose seeds 3 and 4 are finished, 4 with --validation."""
    for seed, name in ((3, "results.json"), (4, "validation-results.json"), (5, "stages.json")):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / name).write_text("{}")
    note(tmp_path, StudyConfig(**CONFIG).recipe)
    return tmp_path


def note(out, recipe, **more):
    config = StudyConfig(**CONFIG).to_json() | more
    (out / "study.json").write_text(json.dumps({"recipe": recipe, "config": config, "sources": []}))


def test_the_finished_seeds_of_a_study_are_found(out):
    study, files = finished_seeds(out, None)
    assert files == {3: out / "seed-3/results.json", 4: out / "seed-4/validation-results.json"}
    assert study.config == StudyConfig(**CONFIG) and study.tests == ["validation", "heldout"]
    assert list(finished_seeds(out, None, [4])[1]) == [4]


def test_a_study_without_images_or_with_other_test_sets_is_rejected(out, pictures, tmp_path):
    study, files = finished_seeds(out, tmp_path / "data", [3])
    with pytest.raises(ValmError, match=f"no arm of {out} sees images: add one of reading, cut, valm, and run"):
        write_budget(replace(study, config=replace(study.config, arms=("base", "blind"))), 3, files[3])
    study.pictures.mkdir()
    write_json(study.pictures / "pictures.json", [asdict(one) for one in pictures])
    write_sets(tmp_path / "data")
    (tmp_path / "data/vicomte/color_single_train.jsonl").write_text('{"sub": "chair", "obj": "brown"}')
    (out / "seed-3/text").mkdir()
    (out / "seed-3/text/validation.csv").write_text("Index,Descriptor,Item,Color\n1,the,gizmoaa,red\n")
    (results,) = synthetic.write(tmp_path, [3])
    with pytest.raises(ValmError, match=f"{out} ran with other test sets: name their folder with --data"):
        write_budget(study, 3, results)


def test_wrong_input_is_one_sentence(out, tmp_path_factory, capsys):
    def error(*arguments):
        assert run_command(build_parser(), ["budget", *map(str, arguments)]) == 1
        return capsys.readouterr().err.removeprefix("python -m studies.color: error: ").strip()

    run = "run `python -m studies.color run CONFIG --out"
    assert error(out, "--seed", 3, "--seed", 5) == f"seed 5 in {out} is not finished: {run} {out} --seed 5`"
    nothing = tmp_path_factory.mktemp("nothing")
    assert error(nothing) == f"{nothing} contains no study, because it lacks study.json: {run} {nothing}`"
    note(nothing, StudyConfig(**CONFIG).recipe)
    assert error(nothing) == f"no seed in {nothing} is finished: {run} {nothing}`"
    for recipe, more in (("another", {}), (StudyConfig(**CONFIG).recipe, {"arms": ["gone"]})):
        note(out, recipe, **more)
        assert error(out) == f"other code made the study in {out}: run the study again in another folder"
