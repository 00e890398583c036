"""Several models side by side: what is cached, what is scored anew, what is said of wrong input."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.tolerance import assert_agree
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.models import model_for, model_of
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.evaluation import scorers, suite
from valm.evaluation.questions import FAIR, what_is_asked
from valm.evaluation.report import markdown
from valm.evaluation.sets import SETS
from valm.evaluation.settings import Settings, listed
from valm.evaluation.suite import CACHE, controls_for, controls_of, evaluate, named, scores_of
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two text-only checkpoints of different seeds, and the sets."""
    root = tmp_path_factory.mktemp("suite")
    write_sets(root / "data")
    tokenizer = prune_tokenizer(clip_tokenizer(), ["the color of the banana is yellow red blue white green"])
    for seed in (0, 1):
        model = model_of(tokenizer, seed=seed, num_images=0, n_positions=96)
        save_checkpoint(model, tokenizer, root / f"seed{seed}")
    return root


def settings(world, tasks="memory_color,relative_size", **arguments) -> Settings:
    return Settings(**{"tasks": listed(tasks), "data": world / "data"} | arguments)


@pytest.fixture
def calls(monkeypatch):
    """Counts what models are really asked."""
    counted = []
    for name in ("answers", "documents"):
        own = getattr(scorers.CausalScorer, name)

        def count(self, asked, progress, own=own):
            counted.append((asked.task, asked.protocol))
            return own(self, asked, progress)

        monkeypatch.setattr(scorers.CausalScorer, name, count)
    return counted


def test_every_model_has_a_row_for_every_task_and_protocol(world):
    results = evaluate(named([f"{world}/seed0", f"{world}/seed1"]), settings(world, "memory_color,lm"), progress=False)
    rows = [(row["model"], row["task"], row["protocol"]) for row in results["rows"]]
    tasks = [(task, p) for task in ("memory_color", "wikitext103", "lambada") for p in ("published", "fair")]
    assert rows == [(model, *task) for model in ("seed0", "seed1") for task in tasks]
    assert {(pair["first"], pair["second"]) for pair in results["pairs"]} == {("seed0", "seed1")}
    metrics = [(pair["task"], pair["protocol"], pair["metric"]) for pair in results["pairs"]]
    assert metrics == [
        ("memory_color", "published", "accuracy"),
        ("memory_color", "fair", "accuracy"),
        ("memory_color", "fair", "calibrated by mean"),
        *(("wikitext103", protocol, "nats per byte") for protocol in ("published", "fair")),
        *(("lambada", protocol, "accuracy") for protocol in ("published", "fair")),
    ]
    values = {
        (row["model"], name): row["metrics"][name]["value"]
        for row in results["rows"]
        for name in ("accuracy", "calibrated_mean")
        if row["task"] == "memory_color" and row["protocol"] == "fair"
    }
    for pair, name in zip(results["pairs"][1:3], ("accuracy", "calibrated_mean"), strict=True):
        assert pair["value"] == pytest.approx(values["seed0", name] - values["seed1", name])


def test_ones_own_questions_are_asked_in_the_fair_protocol_whatever_that_of_the_sets(world, tmp_path):
    (tmp_path / "mine.csv").write_text("question,answer,choices\nthe banana is,yellow,yellow|red\n")
    own = Settings(ask=[tmp_path / "mine.csv"])
    both = replace(own, tasks=("memory_color",), data=world / "data", protocol="published")
    for chosen, expected in ((own, []), (replace(both, tasks=None), []), (both, [("memory_color", "published")])):
        results = evaluate({"model": [str(world / "seed0")]}, chosen, progress=False)
        assert [(row["task"], row["protocol"]) for row in results["rows"]] == [*expected, ("ask-mine", FAIR)]
        assert "Your questions: mine, 1 item" in markdown(results)


def test_a_killed_run_goes_on_and_a_retrained_model_is_scored_anew(world, tmp_path, calls):
    asked = settings(world, protocol=FAIR)
    model = {"model": [str(world / "seed0")]}
    first = evaluate(model, asked, tmp_path, progress=False)
    assert calls == [("memory_color", FAIR), ("relative_size", FAIR)]
    next((tmp_path / CACHE).glob("relative_size*")).unlink()  # as if the run had been killed before it
    calls.clear()
    assert evaluate(model, asked, tmp_path, progress=False) == first
    assert calls == [("relative_size", FAIR)]
    calls.clear()
    retrained = evaluate({"model": [str(world / "seed1")]}, asked, tmp_path, progress=False)
    assert len(calls) == 2 and retrained["rows"] != first["rows"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_diverged_model_has_no_answers(world, tmp_path, cached):
    """The first of several NaN would be its answer, to every question."""

    class Diverged:
        kind = "causal language model"

        def answers(self, asked, progress):
            scores = torch.zeros(len(asked.texts), len(asked.texts[0]), len(asked.candidates))
            scores[-1] = torch.nan
            return scores, None

    asked = what_is_asked(SETS["memory_color"], FAIR, settings(world).data)
    cache = tmp_path if cached else None
    with pytest.raises(ValmError, match="the scores of memory_color are NaN: weights of the causal language model are"):
        scores_of(Diverged(), asked, cache, [], SimpleNamespace(n=0, update=lambda count: None))
    assert not list(tmp_path.iterdir())


def test_damaged_scores_are_scored_again(world, tmp_path, calls):
    asked, model = settings(world, "memory_color", protocol=FAIR), {"model": [str(world / "seed0")]}
    first = evaluate(model, asked, tmp_path, progress=False)
    (file,) = (tmp_path / CACHE).iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-100], whole[:90] + b"x" + whole[91:]):
        file.write_bytes(damaged)
        calls.clear()
        assert evaluate(model, asked, tmp_path, progress=False) == first
        assert len(calls) == 1 and file.read_bytes() == whole


def test_every_model_is_opened_once_and_hashed_only_for_a_cache(world, tmp_path, monkeypatch):
    opened, hashed = [], []
    own_open, own_hash = suite.open_scorer, scorers.model_fingerprint
    monkeypatch.setattr(suite, "open_scorer", lambda source, more: opened.append(source) or own_open(source, more))
    monkeypatch.setattr(scorers, "model_fingerprint", lambda *model: hashed.append(model) or own_hash(*model))
    models = {"both": [str(world / "seed0"), str(world / "seed1")], "one": [str(world / "seed1")]}
    evaluate(models, settings(world, "memory_color"), progress=False)
    assert opened == [source for sources in models.values() for source in sources] and not hashed
    evaluate(models, settings(world, "memory_color"), tmp_path, progress=False)
    assert len(hashed) == 3


def test_no_model_is_opened_where_something_is_missing(world, tmp_path, monkeypatch):
    """What can be known without a model."""
    monkeypatch.setattr(suite, "open_scorer", lambda *_, **__: pytest.fail("it was opened"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for others, arguments, message in [
        ([f"{tmp_path}/none"], {}, "there is no model folder .*none"),
        ([f"{empty}"], {}, "the folder .*empty contains no model: there is neither config.json nor"),
        ([], {"tasks": "sst2", "data": tmp_path}, "SST-2 is not here"),
        ([], {"controls": ["of"]}, "--controls: of is no folder of images: give off, random or a folder"),
        ([], {"controls": [str(empty)]}, "no images in"),
        ([], {"limit": 0}, "--limit is 0, expected at least 1"),
        ([], {"protocol": "unfair"}, "--protocol must be one of fair, published, both, got 'unfair'"),
        ([], {"tasks": "vicomte_size", "protocol": "published"}, "none of the tasks has the protocol"),
    ]:
        with pytest.raises(ValmError, match=message):
            evaluate(named([f"{world}/seed0", *others]), settings(world, **arguments), progress=False)


def test_other_data_are_scored_anew(world, tmp_path, calls):
    model = {"model": [str(world / "seed0")]}
    evaluate(model, settings(world, "color_terms", protocol=FAIR), tmp_path, progress=False)
    write_sets(tmp_path / "data")
    (tmp_path / "data/object_color/color-concrete-objects.csv").write_text("object,color\nlemon,yellow\n")
    other = settings(world, "color_terms", protocol=FAIR, data=tmp_path / "data")
    assert evaluate(model, other, tmp_path, progress=False)["rows"][0]["items"] == 1
    assert len(calls) == 2


def test_no_batch_size_and_no_order_changes_a_score(world, monkeypatch, tmp_path):
    model = {"model": [str(world / "seed0")]}
    asked = settings(world, "memory_color,sst2,lambada", protocol=FAIR)
    first = evaluate(model, asked, progress=False)["rows"]
    monkeypatch.setattr(scorers, "BATCH_SIZE", 1)
    for one, other in zip(first, evaluate(model, asked, progress=False)["rows"], strict=True):
        for name, value in one["metrics"].items():
            if name != "baselines":
                assert other["metrics"][name] == pytest.approx(value, rel=1e-5)
    write_sets(tmp_path)
    file = tmp_path / "nlu/sst2_dev.txt"
    file.write_text("\n".join(reversed(file.read_text().splitlines())))
    scorer = scorers.open_scorer(str(world / "seed0"), Settings())
    sets = (what_is_asked(SETS["sst2"], FAIR, data) for data in (world / "data", tmp_path))
    plain, turned = (scorer.answers(one, None)[0] for one in sets)
    assert_agree(plain, turned.flip(0))


def test_checkpoints_of_several_seeds_are_one_row(world):
    seeds = [str(world / "seed0"), str(world / "seed1")]
    models = {"one": seeds[:1], "two": seeds[1:], "both": seeds}
    rows = evaluate(models, settings(world, "color_terms", protocol=FAIR), progress=False)["rows"]
    one, two, both = (row["metrics"]["accuracy"]["value"] for row in rows)
    assert rows[2]["checkpoints"] == 2 and both == pytest.approx((one + two) / 2)


def test_a_task_that_a_model_cannot_be_asked_has_a_reason(world):
    results = evaluate(named([f"{world}/seed0"]), settings(world, "relative_size"), progress=False)
    published, fair = results["rows"]
    assert "tokens for this tokenizer" in published["not_applicable"] and "metrics" not in published
    assert fair["metrics"]["accuracy"]["value"] >= 0


def test_names_of_models(tmp_path):
    assert named(["a/b/", "name=c,d"]) == {"b": ("a/b/",), "name": ("c", "d")}
    assert list(named(["a/x", "b/x", ".", "c/y/z"])) == ["a/x", "b/x", os.path.basename(os.getcwd()), "z"]
    assert list(named(["a/x/model", "b/x/model"])) == ["a/x/model", "b/x/model"]
    for names, message in (
        (["a/x", "x=b"], "two models are called 'x'"),
        (["a/x", "a/x/"], "the model a/x is given twice"),
        (["x="], "names no model"),
    ):
        with pytest.raises(ValmError, match=message):
            named(names)


def test_a_blind_model_beside_others_has_no_row_of_replaced_images(world, clip, tmp_path):
    """Random images cannot stand for its own query; the comparison goes on without that row."""
    retriever = BlindRetriever(ContextEncoder(clip))
    blind = model_for(retriever, blind=True)
    blind.set_retriever(retriever)
    scorer = scorers.CausalScorer(blind, clip.tokenizer, "blind")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    controls = controls_of(settings(world, controls=["off", "random", str(tmp_path)]))
    assert list(controls) == ["", "no images", "random images", f"images of {tmp_path.name}"]
    assert scorer.sees_images and list(controls_for(scorer, controls)) == ["", "no images"]
