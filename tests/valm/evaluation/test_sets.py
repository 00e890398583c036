"""Files of the evaluation sets and of the user's own questions are read, and what is wrong in them is named."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.valm.evaluation.small_sets import write_sets
from valm.errors import ValmError
from valm.evaluation.questions import FAIR, what_is_asked
from valm.evaluation.sets import SETS, Item, load_memory_color, own_sets

DATA = os.environ.get("VALM_EVAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="VALM_EVAL_DATA does not say where the evaluation sets are")


@needs_data
def test_the_items_are_the_published_ones():
    items = load_memory_color(Path(DATA) / "eval" / SETS["memory_color"].file)
    assert items[1] == Item("ocean", "blue", "the")
    assert Counter(item.descriptor for item in items)[""] == 54
    items = SETS["color_terms"].load(Path(DATA) / "eval" / SETS["color_terms"].file)
    assert items[1] == Item("banana", "yellow", None)
    pairs = SETS["relative_size"].load(Path(DATA) / "eval" / SETS["relative_size"].file)
    assert (len(pairs), len({thing for pair in pairs for thing in pair})) == (486, 41)


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("sst2", "1 good\n2 bad", r"sst2_dev\.txt, line 2: expected 0 or 1"),
        ("ag_news", '"7","text"', r"agnews_test\.csv, row 1: expected a class"),
        ("vicomte_material", '{"sub": "a"}', "line 1: expected an object"),
        ("lambada", "\n", "contains no items"),
        ("relative_size", "bus cat\nbus\n", "line 2: expected two words, got 1"),
        ("color_terms", "thing\nsea\n", r"has the columns \['thing'\], expected"),
    ],
)
def test_wrong_rows_are_named(tmp_path, task, content, message):
    write_sets(tmp_path)
    (tmp_path / SETS[task].file).write_text(content)
    with pytest.raises(ValmError, match=message):
        what_is_asked(SETS[task], FAIR, tmp_path)


def test_an_unknown_class_is_named(tmp_path):
    write_sets(tmp_path)
    (tmp_path / "nlu/agnews_meta.txt").write_text("1: Weather")
    with pytest.raises(ValmError, match=r"agnews_meta\.txt, line 1: expected NUMBER: CLASS"):
        what_is_asked(SETS["ag_news"], FAIR, tmp_path)


@pytest.mark.parametrize("files", [("q.csv", "q.txt"), ("a/b.csv", "c/b.csv", "a-b.csv")])
def test_questions_that_would_have_one_name_are_refused(files):
    with pytest.raises(ValmError, match=rf"--ask: {files[0]} and {files[-1]} would both be ask-.*: rename one of the"):
        own_sets(files)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("A,x,x|y\n,x,x|y", r"mine\.csv, row 3: the question is empty"),
        ("A,x,x", "row 2: expected two or more different choices with | between them, got 'x'"),
        ("A,x,x|x", "row 2: expected two or more different choices"),
        ("A,x,x|y|", "row 2: expected two or more different choices"),
        ("A,z,x|y", r"row 2: the answer 'z' is not one of the choices x\|y"),
        ("A,x", "row 2: expected 3 values"),
        ("", r"mine\.csv contains no items"),
    ],
)
def test_wrong_questions_are_named(tmp_path, rows, message):
    (tmp_path / "mine.csv").write_text(f"question,answer,choices\n{rows}\n")
    (mine,) = own_sets([tmp_path / "mine.csv"])
    with pytest.raises(ValmError, match=message.replace("with |", r"with \|")):
        what_is_asked(mine, FAIR)


def test_a_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(ValmError, match=r"SST-2 is not here \(no nlu/sst2_dev.txt in .*get it from https://.*sst2, or"):
        what_is_asked(SETS["sst2"], FAIR, tmp_path)
    monkeypatch.delenv("VALM_EVAL_DATA", raising=False)
    with pytest.raises(ValmError, match="neither --data nor VALM_EVAL_DATA"):
        what_is_asked(SETS["memory_color"], FAIR)


def test_a_set_without_a_file_is_read_from_the_hub_where_that_is_allowed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, split, trust_remote_code):
        asked.append((*names, split, trust_remote_code))
        return datasets.Dataset.from_list([{"text": "Shares fell.", "label": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = what_is_asked(SETS["ag_news"], FAIR, tmp_path, allow_download=True)
    assert asked == [("fancyzhang/ag_news", None, "test", False)]
    assert found.candidates[found.right[0][0]] == "business"

    def unreachable(*names, split, trust_remote_code):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValmError, match=r"cannot load AG News from the Hub \(fancyzhang/ag_news\): no route"):
        what_is_asked(SETS["ag_news"], FAIR, tmp_path, allow_download=True)


def test_the_documentation_has_every_set():
    lines = (Path(__file__).parents[3] / "docs" / "reference" / "test-sets.md").read_text(encoding="utf-8").splitlines()
    for name, entry in SETS.items():
        row = next(line for line in lines if line.startswith("|") and f"| `{name}` |" in line)
        facts = (entry.title, f"{entry.items:,}", f"`{entry.file}`", entry.source, entry.url, entry.licence)
        assert all(f"| {fact} |" in row for fact in (*facts, ", ".join(entry.protocols)))
