"""What a plan refuses, and that it is the training of `valm train`, whose tests have the rest."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.valm.cli.commands import SIZE, run
from valm import load
from valm.corpus.texts import TextCorpus
from valm.errors import ValmError
from valm.training import TrainingPlan, run_plan, training_arguments
from valm.training.plan import BASE_LR, LR, validation_of

TEXT = {"corpus": TextCorpus(["corpus.txt"])}
RETRIEVED = {"retrieval": "retrieval"}
WITH_KB = RETRIEVED | {"kb": "kb"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either a corpus or --retrieval"),
        (TEXT | RETRIEVED, "give either a corpus or --retrieval"),
        (TEXT | {"patience": 1}, "--patience counts evaluations: give --validation too"),
        (WITH_KB | {"base": "base", "model": "tiny"}, "--model is the size of a new model, but --base has its own"),
        (TEXT | {"base_kl": 1.0}, "--base-kl is for a pretrained decoder: give --base too"),
        (TEXT | {"twin": "random"}, "--twin is for a model with images: give --kb too"),
        (TEXT | {"steps": 0}, "--steps is 0, expected at least 1"),
        (TEXT | {"context": 0}, "--context is 0, expected at least 1"),
        (TEXT | {"validation": 0.5, "patience": -1}, "--patience is -1, expected at least 0"),
        (TEXT | {"model": "smal"}, "--model is 'smal', did you mean small.; sizes are tiny .4x128x8., small"),
        (TEXT | {"model": "3x32x0"}, "--model is '3x32x0'; sizes are"),
        (TEXT | {"lr": -1.0}, "--lr is -1.0, expected at least 0"),
        (TEXT | {"lr": float("nan")}, "--lr is nan, expected at least 0"),
        (WITH_KB | {"base": "base", "base_kl": -0.1}, "--base-kl is -0.1, expected at least 0"),
        (WITH_KB | {"twin": "tetx"}, "--twin must be one of text, random, blind, shuffled, got 'tetx'"),
        (TEXT | {"base": "base"}, "--base trains only what sees images, so without images nothing trains"),
        (WITH_KB | {"base": "base", "twin": "text"}, "--base trains only what sees images, so without images nothing"),
        (WITH_KB | {"tokenizer": "t"}, "--tokenizer is for a new text-only model: --base has its own"),
        (TEXT, "the corpus: there is no corpus.txt"),
        (WITH_KB, "--kb: there is no kb"),
        (RETRIEVED, "--retrieval: there is no retrieval"),
        (TEXT | {"fields": {"output_dir": "b"}}, "--out sets output_dir: leave output_dir out"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_opened(tmp_path, fields, message):
    with pytest.raises(ValmError, match=f"^{message}"):
        run_plan(TrainingPlan(out=tmp_path / "out", **fields))
    assert not list(tmp_path.iterdir())


def test_a_base_has_its_own_learning_rate():
    new, base = TrainingPlan(out="x", **WITH_KB), TrainingPlan(out="x", base="base", **WITH_KB)
    assert (new.learning_rate(), base.learning_rate()) == (LR, BASE_LR) == (5e-4, 2e-3)
    assert TrainingPlan(out="x", base="base", lr=1e-4, **WITH_KB).training_fields()["learning_rate"] == 1e-4


@pytest.fixture
def corpus(tmp_path):
    texts = [f"the color of the {thing} is {color}" for thing in ("apple", "sea", "sky") for color in ("red", "blue")]
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    return tmp_path / "corpus.txt"


def test_a_plan_is_the_training_of_the_command(tmp_path, clip, corpus):
    """The same model, and the same note, so that either goes on where the other ended."""
    clip.save(tmp_path / "clip")
    sizes = {"model": "3x32x4", "context": 32, "steps": 3, "batch_size": 4}
    plan = {"corpus": TextCorpus([corpus]), "tokenizer": str(tmp_path / "clip"), **sizes, "validation": 0.3}
    training = run_plan(TrainingPlan(out=tmp_path / "plan", **plan), command="from Python")
    assert training.state.global_step == 3 and "from Python" in (tmp_path / "plan" / "README.md").read_text()
    with pytest.raises(ValmError, match="plan"):  # which is there
        run_plan(TrainingPlan(out=tmp_path / "plan", **plan))
    command = ["train", corpus, "--tokenizer", tmp_path / "clip", *SIZE, "--validation", 0.3]
    assert run(*command, "--out", tmp_path / "command") == 0
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("plan", "command"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    notes = [json.loads((tmp_path / name / "_run.json").read_text()) for name in ("plan", "command")]
    assert notes[0] == notes[1] and notes[0]["validation"] == "0.3"
    assert run(*command, "--out", tmp_path / "plan", "--resume") == 0
    run_file = tmp_path / "plan" / "_run.json"
    for damaged in (True, [0.3], {}):
        run_file.write_text(json.dumps(notes[0] | {"validation": damaged}))
        with pytest.raises(ValmError, match="contains another training: its --validation is"):
            run_plan(TrainingPlan(out=tmp_path / "plan", resume=True, **plan))
    run_file.write_text(json.dumps(notes[0]))
    with pytest.raises(ValmError, match=r"contains another training: its --lr is 0.0005, here it is 1.0"):
        run_plan(TrainingPlan(out=tmp_path / "plan", resume=True, lr=1.0, **plan))


@pytest.mark.parametrize(
    ("fields", "evaluates", "saves"),
    [
        ({}, 50, 50),
        ({"steps": 7}, 1, 1),
        ({"steps": 399}, 19, 19),
        ({"fields": {"max_steps": 60}}, 3, 3),
        ({"fields": {"num_train_epochs": 2}}, 0.05, 0.05),
        ({"fields": {"save_steps": 7}}, 7, 7),
        ({"fields": {"eval_steps": 7}}, 7, 7),
        ({"fields": {"eval_steps": 7, "save_steps": 14}}, 7, 14),
    ],
)
def test_an_evaluation_takes_place_at_each_twentieth_of_the_steps(tmp_path, fields, evaluates, saves):
    found = TrainingPlan(out=tmp_path, **TEXT, validation=0.5, **fields).training_fields()
    assert (found["eval_steps"], found["save_steps"]) == (evaluates, saves)
    training_arguments(tmp_path, **found)


def test_a_training_that_is_evaluated_stops_after_three_evaluations_without_gain(tmp_path, clip, corpus):
    clip.save(tmp_path / "clip")
    sizes = {"model": "2x32x4", "context": 32, "steps": 6, "batch_size": 4, "lr": 0.0}
    plan = {"corpus": TextCorpus([corpus]), "tokenizer": str(tmp_path / "clip"), "validation": 0.3, **sizes}
    cases = [({}, 4), ({"patience": 0}, 6), ({"patience": 2}, 3), ({"validation": None}, 6)]
    cases.append(({"fields": {"load_best_model_at_end": False}}, 6))
    for number, (more, steps) in enumerate(cases):
        assert run_plan(TrainingPlan(out=tmp_path / str(number), **(plan | more))).state.global_step == steps


@pytest.mark.parametrize(
    ("given", "means"),
    [("0.10", 0.1), ("1e-05", 1e-5), (0.1, 0.1), ("./v.txt", Path("v.txt")), (Path("0.1"), Path("0.1"))],
)
def test_what_a_validation_means(given, means):
    assert validation_of(given) == means and str(validation_of(str(means))) == str(validation_of(str(given)))


def test_a_plan_retrieves_its_corpus(tmp_path, clip, make_kb, corpus):
    clip.save(tmp_path / "clip")
    kb = make_kb(5)
    sizes = {"model": "2x32x4", "context": 32, "steps": 1, "batch_size": 2}
    plan = {"corpus": TextCorpus([corpus]), "kb": kb.path, **sizes}
    run_plan(TrainingPlan(out=tmp_path / "model", validation=corpus, **plan))
    names = [path.name for path in tmp_path.glob("model*")]
    assert sorted(names) == ["model", "model-retrieval", "model-validation-retrieval"]
    model, _ = load(tmp_path / "model", clip=tmp_path / "clip")
    assert model.fusion_options.num_images == 4 and model.retriever.encoder.query == "eot"
    with pytest.raises(ValmError, match="--twin must be one of text, random, blind, shuffled, got 'other'"):
        run_plan(TrainingPlan(out=tmp_path / "other", twin="other", **plan))
